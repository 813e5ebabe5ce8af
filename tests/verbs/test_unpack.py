"""unpack: the model folder comes back out of an export, or nothing is written and the reason is said."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import spp_fx
from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.exporters.format import FORMATS
from spp_fx.storage.safetensors import Shard
from spp_fx.verbs import unpack as module
from spp_fx.verification.verdict import Finding
from tests.command import command, listing, must, one_line, tensors
from tests.worlds import made_once


@pytest.fixture(scope="module")
def exports(made, tmp_path_factory):
    """The merged model of the small world, in the forms that give its files back byte for byte."""

    def make(folder):
        for name in ("sparse-bitmask", "safetensors"):
            must("export", made / "merged", "-o", folder / name, "--format", name)

    return made_once(tmp_path_factory, "exports", make)


@pytest.mark.parametrize("name", ["sparse-bitmask", "safetensors"])
def test_export_and_unpack_give_the_same_folder(made, exports, tmp_path, name):
    data = must("unpack", exports / name, "-o", tmp_path / "back", "--json", "-q").json
    assert data["ok"]
    assert data["bit_for_bit"]
    assert data["format"] == name
    assert data["checks"]["masks_equal"] > 0
    assert data["checks"]["tensors_equal"] == len(tensors(made / "merged"))
    assert listing(tmp_path / "back") == listing(made / "merged")
    assert {file["name"]: file["bytes"] for file in data["files"]} == {
        path.name: path.stat().st_size for path in (made / "merged").iterdir()
    }


def test_a_packed_format_gives_one_file_with_every_tensor(made, exports, tmp_path, monkeypatch):
    """Any format that decodes: here the plain one, as if it did not know the files of the model."""
    monkeypatch.setattr(FORMATS["safetensors"], "restore", lambda *_: False)
    done = spp_fx.unpack(exports / "safetensors", str(tmp_path / "back"))
    assert not done.exact
    theirs, ours = tensors(made / "merged"), tensors(tmp_path / "back")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    must("verify", tmp_path / "back")


def test_the_default_name_and_the_words(exports, tmp_path):
    copy = shutil.copytree(exports / "sparse-bitmask", tmp_path / "e")
    result = must("unpack", copy, "-q")
    assert "byte for byte" in result.out
    assert (tmp_path / "e-unpacked" / "model.safetensors").is_file()
    assert "exists" in one_line(command("unpack", copy, "-q").err)
    must("unpack", copy, "-q", "--force")


def test_a_format_that_cannot_give_a_model_back_is_refused_with_the_reason(exports, tmp_path):
    out = shutil.copytree(exports / "sparse-bitmask", tmp_path / "e")
    text = (out / "export.json").read_text().replace('"format": "sparse-bitmask"', '"format": "onnx"')
    (out / "export.json").write_text(text)
    result = command("unpack", out, "-o", tmp_path / "back", "-q")
    assert result.code == 2
    assert "onnx is a program of its own" in one_line(result.err)
    assert "sparse-bitmask" in result.err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("what", ["merged", "nowhere", "text.txt"])
def test_what_is_no_export_is_refused(made, tmp_path, what):
    result = command("unpack", made / what, "-o", tmp_path / "back", "-q")
    assert result.code == 2
    assert "spp-fx export" in one_line(result.err)


def test_a_lock_that_does_not_hold_leaves_nothing(exports, tmp_path, monkeypatch):
    """The masks of the output are looked at once more, whatever the export says of itself."""
    right = module.verify

    def other(path, **options):
        verdict = right(path, **options)
        lost = Finding("mask-changed", "row 0, column 0: lost", "row 0, column 0")
        return replace(verdict, sites=(replace(verdict.sites[0], findings=(lost,)),))

    monkeypatch.setattr(module, "verify", other)
    with pytest.raises(MaskError, match=r"read back from the unpacked model: .*row 0, column 0: lost"):
        spp_fx.unpack(exports / "sparse-bitmask", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_that_was_restored_wrong_is_found(exports, tmp_path, monkeypatch):
    chosen = FORMATS["sparse-bitmask"]
    right = chosen.restore

    def wrong(export, manifest, target, tick):
        done = right(export, manifest, target, tick)
        path = next(target.glob("*.safetensors"))
        info = next(iter(Shard.open(path).header.tensors.values()))
        with path.open("r+b") as file:
            file.seek(info.start)
            byte = file.read(1)[0]
            file.seek(info.start)
            file.write(bytes([byte ^ 1]))
        return done

    monkeypatch.setattr(chosen, "restore", wrong)
    with pytest.raises(FormatError, match="is not what the export decodes to"):
        spp_fx.unpack(exports / "sparse-bitmask", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_leads_out_of_the_folder_is_refused(exports, tmp_path):
    out = shutil.copytree(exports / "sparse-bitmask", tmp_path / "e")
    data = json.loads((out / "export.json").read_text())
    data["files"]["../stolen"] = "0" * 64
    (out / "export.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="stolen"):
        spp_fx.unpack(out, tmp_path / "back")


def test_the_output_may_not_be_the_export(exports):
    with pytest.raises(UsageError, match="is the input"):
        spp_fx.unpack(exports / "sparse-bitmask", exports / "sparse-bitmask", force=True)
