"""verify as a release gate: damage is a verdict in every form, exit codes are fixed, jobs change nothing."""

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spp_fx.errors import FormatError
from spp_fx.sparsity.pattern import NM
from spp_fx.verbs.verify import Check, run_check, verify
from tests.command import command, one_line, rewrite
from tests.handmade import Raw, lock_of, save, save_model, sparse

NAMES = [f"model.layers.{layer}.mlp.{word}_proj.weight" for layer in range(8) for word in ("up", "down")]


@pytest.fixture
def model(tmp_path) -> Path:
    """Sixteen 2:4 weights in three shards, with their lock."""
    tensors = {name: sparse(16, 32, seed=number) for number, name in enumerate(NAMES)}
    folder = tmp_path / "model"
    save_model(folder, [{name: tensors[name] for name in NAMES[at::3]} for at in range(3)])
    (folder / "sparsity.lock.json").write_text(lock_of(tensors, NM(2, 4)).dumps())
    return folder


def shard(model: Path, number: int) -> Path:
    return model / f"model-0000{number}-of-00003.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(model: Path, name: str = NAMES[0]) -> None:
    """Row 0, column 0..3 of a weight of the first shard become non-zero."""
    path = shard(model, 1)
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
    data[start : start + 16] = b"\0\0\x80\x3f" * 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda m: truncate(shard(m, 2)), "00002-of-00003"),
    "lost": (lambda m: shard(m, 3).unlink(), "00003-of-00003"),
    "no header": (lambda m: shard(m, 1).write_bytes(b"\xff" * 64), "00001-of-00003"),
    "no lock": (lambda m: (m / "sparsity.lock.json").write_text("{"), "sparsity.lock.json"),
    "no index": (lambda m: (m / "model.safetensors.index.json").write_text("[]"), "index.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_verdict_in_every_form(model, tmp_path, name):
    damage, word = DAMAGE[name]
    damage(model)
    result = command(
        "verify", model, "--json", "--github", "--junit", tmp_path / "r.xml", "--sarif", tmp_path / "r.sarif"
    )
    assert result.code == 1
    verdict = result.json
    assert verdict["ok"] is False
    assert verdict["kind"] == "model"
    assert verdict["sites"] == []
    (problem,) = verdict["problems"]
    assert word in problem
    assert word in one_line(result.err)
    assert result.err.startswith("::error title=model::")
    (case,) = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert word in case[0].get("message", "")
    (found,) = json.loads((tmp_path / "r.sarif").read_text())["runs"][0]["results"]
    assert found["ruleId"] == "artifact-damaged"
    assert word in found["message"]["text"]


def test_damage_in_words_is_one_line_on_stderr(model):
    truncate(shard(model, 2))
    result = command("verify", model)
    assert (result.code, result.out) == (1, "")
    assert "truncated" in one_line(result.err)


def test_debug_shows_where_damage_was_found(model):
    truncate(shard(model, 2))
    result = command("verify", model, "--debug", "--json")
    assert result.json["problems"]
    assert "Traceback" in result.err
    assert "read_header" in result.err


def test_in_python_damage_is_raised(model):
    truncate(shard(model, 2))
    with pytest.raises(FormatError, match="truncated"):
        verify(model)


def test_a_site_that_cannot_be_read_fails_and_the_others_are_checked(model):
    """A dtype that has no zero: its header is right, its weight is not to be looked at."""
    path = shard(model, 1)
    bits = sparse(16, 32).bits.astype("u1")
    names = NAMES[0::3]
    save(
        path,
        {
            name: Raw("F8_E8M0", bits) if name == names[0] else sparse(16, 32, seed=NAMES.index(name))
            for name in names
        },
    )
    verdict = run_check(Check(model))
    (site,) = verdict.failed
    assert site.name == names[0]
    assert site.findings[0].rule == "artifact-damaged"
    assert "F8_E8M0" in (site.reason or "")
    assert sum(bool(site.mask_equal) for site in verdict.sites) == len(NAMES) - 1


def test_a_file_that_disappears_on_the_way_is_a_verdict(model):
    def tick(name: str, nbytes: int) -> None:
        shard(model, 1).unlink(missing_ok=True)

    verdict = run_check(Check(model), jobs=1, tick=tick)
    assert not verdict.ok
    assert {site.findings[0].rule for site in verdict.failed} == {"artifact-damaged"}
    assert all("00001-of-00003" in (site.reason or "") for site in verdict.failed)


def test_the_other_artifact_damaged_is_a_verdict(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    truncate(shard(other, 2))
    result = command("verify", model, "--against", other, "--json")
    assert result.code == 1
    assert str(other) in result.json["problems"][0]


@pytest.mark.parametrize(
    "line",
    [
        "nowhere",
        "model --pattern 5:4",
        "model --policy nowhere.toml",
        "model --lock no.json",
        "model --jobs 0",
    ],
)
def test_a_wrong_command_exits_2_and_prints_no_verdict(model, monkeypatch, line):
    monkeypatch.chdir(model.parent)
    result = command("verify", *line.split(), "--json", "--junit", "r.xml")
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not Path("r.xml").exists()


@pytest.mark.parametrize("break_", [lambda p: p.symlink_to("nowhere"), lambda p: p.mkdir(), os.mkfifo])
def test_a_broken_lock_is_not_ignored(model, break_):
    path = model / "sparsity.lock.json"
    path.unlink()
    break_(path)
    result = command("verify", model, "--require", "up_proj", "--json")
    assert result.code == 1
    assert "sparsity.lock.json" in result.json["problems"][0]


@pytest.mark.parametrize("broken", [False, True])
def test_jobs_do_not_change_a_byte(model, broken):
    if broken:
        flip(model)
    one, four = (command("verify", model, "--json", "--jobs", jobs) for jobs in (1, 4))
    assert one.code == four.code == int(broken)
    assert one.out == four.out
    assert [site["name"] for site in one.json["sites"]] == sorted(NAMES)


def test_a_failing_site_names_the_step_that_wrote_its_file(world):
    path = world / "sparse" / "model.safetensors"
    rewrite(path, lambda values: values["model.layers.0.mlp.up_proj.weight"].fill_(0.5))
    (site,) = verify(world / "sparse").failed
    assert "model.safetensors is not what prune" in (site.origin or "")
    assert (site.reason or "").endswith(f"; {site.origin}")


def test_a_long_list_of_failures_is_cut_and_counted(tmp_path):
    tensors = {f"layers.{number}.weight": sparse(4, 8, seed=number) for number in range(32)}
    save(tmp_path / "w.safetensors", tensors)
    result = command("verify", tmp_path / "w.safetensors", "--pattern", "1:4")
    assert result.code == 1
    lines = result.out.splitlines()
    assert sum(line.startswith("FAIL") for line in lines) == 20
    assert lines[-2] == "... and 12 more; --json lists all"
    assert lines[-1].startswith("not ok: safetensors ")
    assert "32 of 32 sites fail" in lines[-1]


def test_the_rest_of_many_changed_positions_is_counted(tmp_path):
    for seed in (1, 2):
        save(tmp_path / f"{seed}.safetensors", {"layers.0.weight": sparse(16, 32, seed=seed)})
    then, now = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    (site,) = verify(now, against=then).sites
    assert f"zero in {then}, non-zero here ({site.lost_zeros} in all)" in (site.reason or "")
    assert (site.reason or "").count("non-zero here") == 3


def test_rows_of_a_stack_are_counted_in_their_expert(tmp_path):
    stack = sparse(3 * 8, 16)
    raw = Raw(stack.dtype, stack.bits.reshape(3, 8, 16))
    (tmp_path / "sparsity.lock.json").write_text(lock_of({"experts": raw}, NM(2, 4)).dumps())
    column = int((raw.bits[2, 5, 8:12] == 0).argmax()) + 8
    raw.bits[2, 5, column] = 1
    save(tmp_path / "w.safetensors", {"experts": raw})
    (site,) = verify(tmp_path / "w.safetensors").failed
    assert f"expert 2, row 5, column {column}: zero in the lock, non-zero now" in (site.reason or "")
    assert "expert 2, row 5, columns 8-11 hold 3 non-zeros" in (site.reason or "")
