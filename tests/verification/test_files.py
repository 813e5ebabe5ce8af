"""Reports are whole or absent, and one that cannot be written fails the run after the verdict."""

from pathlib import Path

import pytest

from spp_fx.errors import SppFxError
from spp_fx.verification.report import append_report, write_all, write_report
from tests.command import command, one_line
from tests.handmade import save, sparse


@pytest.fixture
def weights(tmp_path) -> Path:
    save(tmp_path / "w.safetensors", {"layers.0.weight": sparse(8, 16)})
    return tmp_path / "w.safetensors"


def test_parents_are_made_and_an_old_report_is_replaced(weights, tmp_path):
    target = tmp_path / "deep" / "er" / "r.xml"
    for _ in range(2):
        assert command("verify", weights, "--pattern", "2:4", "--junit", target).code == 0
        assert target.read_text().startswith("<?xml")
    assert [path.name for path in target.parent.iterdir()] == ["r.xml"]


def test_a_report_that_cannot_be_written_fails_after_the_verdict(weights, tmp_path):
    (tmp_path / "file").touch()
    good = tmp_path / "good.sarif"
    result = command(
        "verify", weights, "--pattern", "2:4", "--junit", tmp_path / "file" / "r.xml", "--sarif", good
    )
    assert result.code == 1
    assert result.out.startswith("ok: safetensors")
    assert "r.xml: the report was not written: " in one_line(result.err)
    assert good.exists(), "the other report is written"


def test_a_folder_is_not_overwritten_by_a_report(weights, tmp_path):
    result = command("verify", weights, "--pattern", "2:4", "--junit", tmp_path)
    assert result.code == 1
    assert "is a folder" in one_line(result.err)


def test_the_step_summary_is_added_to(weights, tmp_path, monkeypatch):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert command("verify", weights, "--pattern", "2:4").code == 0
    assert page.read_text() == "before\n"
    assert command("verify", weights, "--pattern", "1:4", "--github").code == 1
    assert page.read_text().startswith("before\n## spp-fx verify: 1 of 1 artifacts failed\n")


def test_paths_are_relative_to_the_checkout(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path.parent))
    result = command("verify", weights, "--pattern", "1:4", "--github")
    assert f",file={tmp_path.name}/w.safetensors::" in result.out


def test_an_old_report_survives_a_failure(tmp_path, monkeypatch):
    target = tmp_path / "r.xml"
    target.write_text("old")
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(SppFxError, match="No space left"):
        write_report(target, "new")
    assert target.read_text() == "old"


def test_every_report_is_tried_and_all_failures_are_raised(tmp_path):
    done: list[str] = []
    with pytest.raises(SppFxError, match=r"a: the report.*; .*b: the report"):
        write_all(
            [
                lambda: append_report(tmp_path / "no" / "a", "x"),
                lambda: append_report(tmp_path / "no" / "b", "x"),
                lambda: done.append("c"),
            ]
        )
    assert done == ["c"]
