"""safetensors exports: every tensor is compared with the model, through another library."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spp_fx.errors import FormatError
from spp_fx.exporters import plain, read_back
from spp_fx.exporters.manifest import read_manifest
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard
from spp_fx.verbs.export import export
from tests.exporters.test_cusparselt import model_folder

SITE = "model.layers.0.mlp.up_proj.weight"


def test_every_tensor_is_compared(tmp_path):
    extra = {"f4": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "none": torch.zeros(0, 3)}
    model = model_folder(tmp_path / "m", **extra)
    done = export(model, tmp_path / "out", "safetensors")
    with safe_open(str(model / "model.safetensors"), "pt") as file:
        assert done.checks["tensors_equal"] == len(list(file.keys()))
    assert done.checks["masks_equal"] == 7


def test_a_file_is_opened_once_however_many_tensors_it_holds(tmp_path, monkeypatch):
    """The library parses the whole header each time, so that opening it for every tensor takes quadratic time."""
    opened: list[str] = []

    def counting(path, framework):
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr(read_back, "safe_open", counting)
    model = model_folder(tmp_path / "m")
    assert export(model, tmp_path / "out", "safetensors").checks["tensors_equal"] > 10
    assert len(opened) == 2  # the model's and the written one


def test_a_byte_that_changed_on_the_way_is_found(tmp_path, monkeypatch):
    """A site's mask stays what it was, and so does all that is no site: the masks alone would not tell."""
    right = plain.rewrite_shard

    def wrong(source, target, *rest, **options):
        right(source, target, *rest, **options)
        info = Shard.open(target).info("model.layers.0.mlp.up_proj.weight")
        with target.open("r+b") as file:
            file.seek(info.start)
            values = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.float32)
            index = int(values.nonzero()[0])
            file.seek(info.start + 4 * index)
            file.write((values[index] * 2).numpy().tobytes())

    monkeypatch.setattr(plain, "rewrite_shard", wrong)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: byte \d+ differs"):
        export(model_folder(tmp_path / "m"), tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [None, "quantization_config", "compression_config"])
def test_a_sparsity_config_is_left_out_and_that_is_said(tmp_path, place):
    """Servers refuse it, or look for weights that are not there; all other files stay as they are."""
    model = model_folder(tmp_path / "m")
    original = json.loads((model / "config.json").read_text())
    sparsity = {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}}
    quantized = {"quant_method": "compressed-tensors", "config_groups": {}} | sparsity
    (model / "config.json").write_text(json.dumps(original | ({place: quantized} if place else sparsity)))
    (model / "notes.txt").write_bytes(b"as it is\r\n")
    lines: list[str] = []
    done = export(model, tmp_path / "out", "safetensors", say=lines.append)
    assert done.checks["masks_equal"] == 7
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == original
    assert "sparsity_config" in lines[0]
    same = [path.name for path in model.iterdir() if path.name != "config.json"]
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in same)


def test_a_config_without_one_stays_byte_for_byte(tmp_path):
    model = model_folder(tmp_path / "m")
    config = json.loads((model / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (model / "config.json").write_text(json.dumps(config, indent=7))
    lines: list[str] = []
    plain.write_plain_config(ModelFolder.open(model), tmp_path, lines.append)
    assert lines == []
    assert not (tmp_path / "config.json").exists()


def test_an_export_decodes_to_the_tensors_of_the_model(tmp_path):
    out = export(model_folder(tmp_path / "m"), tmp_path / "out", "safetensors").out
    decoded = plain.Plain.decode(out, read_manifest(out))
    values = load_file(tmp_path / "m" / "model.safetensors")
    assert decoded.shapes == {name: tuple(value.shape) for name, value in values.items()}
    assert all(torch.equal(decoded.read(name), value) for name, value in values.items())


def test_types_that_torch_has_not_are_compared_as_whole_files(tmp_path):
    """F6 tensors are copied as bytes, and no library hands them out."""
    model = model_folder(tmp_path / "m", six=torch.arange(6, dtype=torch.uint8))
    path = model / "model.safetensors"
    raw = path.read_bytes()
    old, new = b'"six":{"dtype":"U8","shape":[6]', b'"six":{"dtype":"F6_E2M3","shape":[8]'
    assert old in raw
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(old, new).rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    done = export(model, tmp_path / "out", "safetensors")
    assert done.checks["masks_equal"] == 7


def test_shards_are_compared_each_with_its_own(tmp_path):
    model = model_folder(tmp_path / "m")
    values = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(values)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: values[name] for name in part}, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert export(model, tmp_path / "out", "safetensors").checks["tensors_equal"] == len(names)
