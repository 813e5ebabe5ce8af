"""Exports that were stopped go on where their files were durable, and end with the same bytes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp_fx.errors import FormatError, SppFxError
from spp_fx.exporters import packed, plain, sparse_bitmask
from spp_fx.exporters.format import Source
from spp_fx.exporters.manifest import read_manifest
from spp_fx.exporters.packed import open_files
from spp_fx.verbs.export import export
from spp_fx.verbs.unpack import unpack
from tests.command import listing, tensors
from tests.exporters.packing import bare_folder
from tests.soak.jobs import make_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model of several weight files, in bfloat16."""
    root = tmp_path_factory.mktemp("model")
    make_models(root, width=128, layers=2)
    return root / "sparse"


class Stopped(BaseException):
    """As a kill: nothing in the program handles it."""


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    """Let a function be called so many times, then stop the run; the list counts its calls."""
    real, calls = getattr(owner, name), [0]

    def one(*arguments: object, **named: object) -> object:
        if calls[0] == count:
            raise Stopped
        calls[0] += 1
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, one)
    return calls


def stopped_export(model: Path, out: Path, form: str, count: int, owner: object, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(count, patch, owner, name)
        with pytest.raises(Stopped):
            export(model, out, form)
    assert not out.exists()


@pytest.mark.parametrize(
    ("form", "owner", "name"),
    [
        ("safetensors", plain, "rewrite_shard"),
        ("sparse-bitmask", sparse_bitmask, "write_shard"),
        ("cutlass", packed, "_fill_file"),
        ("cusparselt", packed, "_fill_file"),
    ],
)
def test_finished_files_are_not_written_again(form, owner, name, model, tmp_path, monkeypatch):
    whole = export(model, tmp_path / "whole", form).to_json()
    files = len(list(model.glob("*.safetensors")))
    stopped_export(model, tmp_path / "out", form, 2, owner, name)
    with monkeypatch.context() as patch:
        calls = stop_after(files, patch, owner, name)
        again = export(model, tmp_path / "out", form).to_json()
    assert calls == [files - 2]
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert again["sites"] == whole["sites"]
    assert again["checks"] == whole["checks"]
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize("count", [1, 5])
def test_a_file_that_was_cut_off_or_lost_is_written_again(count, model, tmp_path, monkeypatch):
    """What was being written is no file yet, and what is not as the journal says is written again."""
    export(model, tmp_path / "whole", "cutlass")
    stopped_export(model, tmp_path / "out", "cutlass", count, packed, "_pack_site")
    for finished in (tmp_path / ".out.work" / "out").glob("*.safetensors"):
        finished.write_bytes(b"")
    with monkeypatch.context() as patch:
        calls = stop_after(99, patch, packed, "_pack_site")
        export(model, tmp_path / "out", "cutlass")
    assert calls == [14]
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")


def test_packed_files_mirror_those_of_the_model(model, tmp_path):
    """Each file holds the tensors of one of the model's, and together they give the model back."""
    out = export(model, tmp_path / "out", "cutlass").out
    shards = sorted(model.glob("*.safetensors"))
    names = [f"packed-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name, shard in zip(names, shards, strict=True):
        stored = {tensor.removesuffix(".packed").removesuffix(".meta") for tensor in load_file(out / name)}
        assert stored == load_file(shard).keys()
    unpack(out, tmp_path / "back")
    ours, theirs = tensors(tmp_path / "back"), tensors(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lost_signs_are_counted_by_a_run_that_finds_the_file_finished(tmp_path):
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[:, ::4], weight[:, 1::4], weight[5, 2] = 1, 2, -0.0
    model = bare_folder(tmp_path / "m", {"a.weight": weight}, {}, frozenset())
    stopped_export(model, tmp_path / "out", "cutlass", 0, Source, "copy_small_files")
    with pytest.MonkeyPatch.context() as patch:
        calls = stop_after(99, patch, packed, "_pack_site")
        done = export(model, tmp_path / "out", "cutlass")
    assert calls == [0]
    assert done.manifest.tensors[0].negative_zeros == done.checks["signs_of_zeros_lost"] == 1


def test_a_tensor_in_two_packed_files_is_refused(model, tmp_path):
    out = export(model, tmp_path / "out", "cutlass").out
    first, second = sorted(out.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second, {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{second.name}: {re.escape(name)}: is in .*{first.name} too"):
        open_files(out, read_manifest(out, check_files=False))


def test_other_options_begin_anew(model, tmp_path, monkeypatch):
    said: list[str] = []
    stopped_export(model, tmp_path / "out", "safetensors", 2, plain, "rewrite_shard")
    export(model, tmp_path / "out", "sparse-bitmask", say=said.append)
    assert f"{tmp_path}/.out.work: holds the work of another command (format); starting over" in said


def test_an_input_that_vanishes_is_named_and_what_is_finished_is_kept(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "m")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    real = plain.rewrite_shard

    def lose(shard, file, replace):
        if shard.name == shards[2].name:
            shards[2].unlink()
        return real(shard, file, replace)

    monkeypatch.setattr(plain, "rewrite_shard", lose)
    with pytest.raises(SppFxError, match=rf"No such file.*{shards[2].name}.*keeps 2 files"):
        export(tmp_path / "m", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()
