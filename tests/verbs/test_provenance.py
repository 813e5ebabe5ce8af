"""sparsity.provenance.json: the history of a folder, and the step that a broken file belongs to."""

import hashlib
import json
import shutil

import pytest

from spp_fx.errors import FormatError
from spp_fx.verification.provenance import PROVENANCE, blame, load, record
from spp_fx.version import VERSION
from tests.command import command, listing, must, one_line

FINGERPRINT = "0" * 64
LOCK = "sparsity.lock.json"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_with(path, weights=b"weights", lock=b"lock"):
    """A folder with a weight file and a lock, neither of which is looked into here."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    (path / LOCK).write_bytes(lock)
    return path


def write(folder, step="merge", past=None, digests=None, **settings):
    digests = {"model.safetensors": sha256(folder / "model.safetensors")} if digests is None else digests
    record(past, folder, step, inputs={"model": FINGERPRINT}, settings=settings, digests=digests)
    return folder


@pytest.fixture
def merged(tmp_path):
    return write(folder_with(tmp_path / "merged"), vanish="keep")


def steps(folder):
    history = load(folder)
    assert history is not None
    return [step.step for step in history.steps]


def test_a_step_takes_over_the_history_of_its_input_and_adds_itself(merged, tmp_path):
    out = write(folder_with(tmp_path / "out"), "export", past=merged, format="safetensors")
    assert steps(out) == ["merge", "export"]
    first, last = load(out).steps
    assert first == load(merged).steps[0]
    assert (last.tool_version, last.settings) == (VERSION, {"format": "safetensors"})
    assert last.files["model.safetensors"].bytes == len(b"weights")
    assert last.lock == hashlib.blake2b(b"lock", digest_size=32).hexdigest()


def test_the_same_step_writes_the_same_bytes_wherever_it_runs(tmp_path):
    (tmp_path / "x").mkdir()
    one, other = (
        write(folder_with(path), b=1, a=["q_proj"]) for path in (tmp_path / "one", tmp_path / "x" / "other")
    )
    text = (one / PROVENANCE).read_bytes()
    assert text == (other / PROVENANCE).read_bytes()
    assert text.isascii()
    assert str(tmp_path).encode() not in text


def test_factors_are_left_out_for_training_goes_on_with_them(tmp_path):
    folder = folder_with(tmp_path / "adapter")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    record(None, folder, "inject", inputs={}, settings={}, digests={})
    assert load(folder).steps[0].files == {}


def test_a_folder_without_history_has_none(tmp_path):
    assert load(folder_with(tmp_path / "m")) is None
    assert blame(tmp_path / "m", "model.safetensors") is None


def test_a_file_that_changed_afterwards_is_reported(merged):
    (merged / "model.safetensors").write_bytes(b"Weights")
    sentence = blame(merged, "model.safetensors")
    assert sentence == f"model.safetensors is not what merge (spp-fx {VERSION}) wrote: it changed afterwards"


def test_a_file_that_is_as_it_was_written_lays_the_blame_on_the_step(merged):
    assert blame(merged, "model.safetensors") == (
        f"model.safetensors is byte for byte what merge (spp-fx {VERSION}) wrote, "
        "so its zeros were where they are now when that step ended"
    )


def test_a_file_that_steps_only_copied_belongs_to_the_first_that_wrote_it(merged, tmp_path):
    out = write(folder_with(tmp_path / "out"), "export", past=merged)
    assert "byte for byte what merge" in blame(out, "model.safetensors")


def test_a_lock_of_a_file_that_had_changed_before_is_reported(merged, tmp_path):
    changed = folder_with(tmp_path / "c", weights=b"Weights")
    write(changed, "lock", past=merged)
    assert "it changed before lock" in blame(changed, "model.safetensors")


@pytest.mark.parametrize(("change", "word"), [("replaced", "replaced"), ("removed", "removed")])
def test_a_lock_that_is_no_longer_the_steps_is_reported(merged, change, word):
    (merged / LOCK).unlink()
    if change == "replaced":
        (merged / LOCK).write_bytes(b"another")
    assert blame(merged, "model.safetensors").endswith(f"; {LOCK} was {word} after merge")


def test_without_a_digest_only_another_size_shows_a_change(tmp_path):
    folder = write(folder_with(tmp_path / "m"), digests={})
    assert "it is unknown whether the file changed" in blame(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"longer weights")
    assert "it changed afterwards (14 bytes now, 7 then)" in blame(folder, "model.safetensors")


def test_a_file_that_no_step_wrote_is_reported(merged):
    (merged / "more.safetensors").write_bytes(b"x")
    assert "not one of the files that merge" in blame(merged, "more.safetensors")


@pytest.mark.parametrize("name", ["nowhere.safetensors", "../merged/model.safetensors"])
def test_a_name_outside_of_the_folder_is_not_opened(merged, name):
    assert "byte for byte" not in (blame(merged, name) or "")


def _edit(data, *path, to):
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = to


DAMAGE = {
    "another version": lambda d: _edit(d, "format_version", to=2),
    "no steps": lambda d: _edit(d, "steps", to=[]),
    "too many steps": lambda d: _edit(d, "steps", to=d["steps"] * 1001),
    "unknown step": lambda d: _edit(d, "steps", 0, "step", to="quantize"),
    "unknown key": lambda d: _edit(d, "steps", 0, "time", to="now"),
    "no digest": lambda d: _edit(d, "steps", 0, "lock", to="beef"),
    "a terminal's own words": lambda d: _edit(d, "steps", 0, "tool_version", to="\x1b[2J"),
    "negative size": lambda d: _edit(d, "steps", 0, "files", "model.safetensors", "bytes", to=-1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_history_is_refused_and_said(merged, tmp_path, what):
    data = json.loads((merged / PROVENANCE).read_bytes())
    DAMAGE[what](data)
    (merged / PROVENANCE).write_text(json.dumps(data))
    with pytest.raises(FormatError, match=f"{PROVENANCE}.*remove it"):
        load(merged)
    with pytest.raises(FormatError):
        write(folder_with(tmp_path / "out"), past=merged)
    assert "the step at fault is unknown" in blame(merged, "model.safetensors")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"steps": 1, "steps": 2}'])
def test_only_a_json_object_is_read(merged, data):
    (merged / PROVENANCE).write_bytes(data)
    with pytest.raises(FormatError, match=PROVENANCE):
        load(merged)


def test_a_setting_that_no_json_holds_is_refused(tmp_path):
    with pytest.raises(FormatError, match="merge"):
        write(folder_with(tmp_path / "m"), scale=float("nan"))


def test_an_export_has_the_history_of_all_steps(made):
    assert steps(made / "sparse") == ["prune"]
    assert steps(made / "adapter") == ["prune", "inject"]
    assert steps(made / "merged") == ["prune", "inject", "merge"]
    assert steps(made / "packed") == ["prune", "inject", "merge", "export"]
    last = load(made / "merged").steps[-1]
    assert last.files["model.safetensors"].sha256 == sha256(made / "merged" / "model.safetensors")
    manifest = json.loads((made / "packed" / "export.json").read_bytes())
    assert manifest["files"][PROVENANCE] == sha256(made / "packed" / PROVENANCE)
    exported = load(made / "packed").steps[-1].files
    assert {name: file.sha256 for name, file in exported.items()}.items() <= manifest["files"].items()


def test_verify_reports_that_a_file_changed_after_merge(world):
    path = world / "merged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0] + 8 + length
    place = next(i for i in range(start, start + 400, 4) if data[i : i + 4] == bytes(4))
    data[place : place + 4] = b"\0\0\x80\x3f"
    path.write_bytes(data)
    ran = command("verify", world / "merged", "-q")
    assert ran.code == 1
    assert "is not what merge" in ran.out


def test_a_damaged_history_stops_a_step_before_its_work(world):
    (world / "merged" / PROVENANCE).write_text("{}")
    before = listing(world)
    for words in (("export", "--format", "sparse-bitmask"), ("inject",)):
        ran = command(words[0], world / "merged", *words[1:], "-o", world / "new", "-q")
        assert ran.code == 1
        assert PROVENANCE in one_line(ran.err)
    assert listing(world) == before


def test_a_format_that_gives_the_files_back_gives_the_history_back(world):
    must("export", world / "merged", "-o", world / "e", "--format", "sparse-bitmask", "-q")
    must("unpack", world / "e", "-o", world / "back", "-q")
    assert listing(world / "back") == listing(world / "merged")


def test_any_other_format_adds_the_unpacking(world):
    must("unpack", world / "packed", "-o", world / "back", "-q")
    assert steps(world / "back") == ["prune", "inject", "merge", "export", "unpack"]
    # The bytes that come out of the pack are those that merge wrote.
    assert "byte for byte what merge" in blame(world / "back", "model.safetensors")


def test_a_pruned_copy_does_not_take_the_history_along_as_its_own_file(world):
    shutil.copytree(world / "sparse", world / "again")
    must("prune", world / "again", "-o", world / "tighter", "--pattern", "1:4", "-q")
    assert steps(world / "tighter") == ["prune", "prune"]
