"""A wrong command is an error before anything is checked; a damaged file is a failed check."""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spp_fx.verbs import verify as verify_module
from spp_fx.verification.policy import Check
from tests.command import command, one_line


def policy(*artifacts: str) -> None:
    Path("spp-fx.toml").write_text("".join(f"[[verify.artifact]]\n{artifact}\n" for artifact in artifacts))


LOST = {
    "weights": ("sparse", lambda w: (w / "sparse" / "model.safetensors").unlink()),
    "config.json": ("sparse", lambda w: (w / "sparse" / "config.json").unlink()),
    "factors": ("adapter", lambda w: (w / "adapter" / "adapter_model.safetensors").unlink()),
    "adapter's lock": ("adapter", lambda w: (w / "adapter" / "sparsity.lock.json").unlink()),
    "adapter's base": ("adapter", lambda w: shutil.rmtree(w / "sparse")),
    "packed weights": ("packed", lambda w: next((w / "packed").rglob("*.safetensors")).unlink()),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_file_fails_and_the_other_artifacts_are_checked(world, monkeypatch, name):
    kind, lose = LOST[name]
    monkeypatch.chdir(world)
    policy('path = "merged"', f'path = "{kind}"')
    lose(world)
    result = command("verify", "--json", "--junit", "r.xml")
    assert result.code == 1
    assert [artifact["ok"] for artifact in result.json["artifacts"]] == [True, False]
    assert result.json["artifacts"][1]["problems"]
    suites = ElementTree.parse("r.xml").getroot()
    assert [suite.get("failures") for suite in suites] == ["0", "1"]


WRONG = {
    "a lock that is not there": 'path = "half"\nlock = "nowhere.json"',
    "a lock that is a folder": 'path = "half"\nlock = "merged"',
    "no other artifact": 'path = "half"\nagainst = "nowhere"',
    "another that is no artifact": 'path = "half"\nagainst = "text.txt"',
    "no artifact": 'path = "text.txt"',
    "nothing to check it against": 'path = "dense"',
    "a part of an export": 'path = "packed/model.safetensors"',
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_check_is_an_error_before_the_first_artifact_is_checked(world, monkeypatch, name):
    monkeypatch.chdir(world)
    policy('path = "merged"', WRONG[name])
    checked: list[Path] = []
    monkeypatch.setattr(verify_module, "run_check", lambda check, **_: checked.append(check.path))
    result = command("verify", "--json", "--junit", "r.xml", "-q")
    assert result.code == 2
    assert result.out == ""
    assert one_line(result.err)
    assert checked == []
    assert not Path("r.xml").exists()


def test_an_empty_name_of_a_lock_is_not_ignored(world):
    result = command("verify", world / "sparse", "--lock", "", "-q")
    assert result.code == 2
    assert one_line(result.err)


def test_a_folder_without_its_configuration_is_checked(world):
    (world / "sparse" / "config.json").unlink()
    Check(world / "sparse").validate()
    result = command("verify", world / "sparse", "--json")
    assert (result.code, result.json["kind"]) == (1, "model")
