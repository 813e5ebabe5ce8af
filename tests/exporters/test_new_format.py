"""A format of another package, in one file: the example of CONTRIBUTING runs as it is written there."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import spp_fx
from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.exporters.format import FORMATS
from spp_fx.exporters.manifest import read_manifest, sha256
from spp_fx.verbs.verify import verify
from tests.command import command, must, rewrite, tensors

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().partition("### A format")[2]


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[0]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example as an installed package: its file and its entry point."""
    (group,) = tomllib.loads(block("toml"))["project"]["entry-points"].items()
    (name, value), site = *group[1].items(), tmp_path / "site"
    module = site.joinpath(*value.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    module.write_text(block("python"))
    info = site / "my_formats-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-formats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group[0]}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(site)
    yield name
    FORMATS.pop(name, None)
    for loaded in [name for name in sys.modules if name.startswith("my_formats")]:
        del sys.modules[loaded]


def test_it_is_exported_verified_and_unpacked(installed, locked_model, tmp_path):
    out = tmp_path / "out"
    data = must("export", locked_model, "--format", installed, "-o", out, "--json", "-q").json
    assert data["format"] == "coordinates"
    assert data["checks"] == {"tensors_equal": len(tensors(locked_model)), "masks_equal": 7}
    assert must("verify", out, "--json", "-q").json["kind"] == "coordinates"
    must("verify", out, "--against", locked_model)

    must("unpack", out, "-o", tmp_path / "back")
    ours, theirs = tensors(tmp_path / "back"), tensors(locked_model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_options_reach_the_command_line(installed, locked_model, tmp_path):
    out = tmp_path / "out"
    must("export", locked_model, "--format", installed, "--index", "int32", "--dtype", "float16", "-o", out)
    name = read_manifest(out).tensors[0].name
    written = tensors(out)
    assert written[f"{name}.positions"].dtype == torch.int32
    assert written[f"{name}.values"].dtype == torch.float16

    helped = " ".join(command("export", "--help").out.split())
    assert "--index [int32|int64] coordinates: Type of the positions. [default: int64]" in helped
    refused = command("export", locked_model, "--format", installed, "--with-past", "-o", tmp_path / "x")
    assert refused.code == 2
    said = "coordinates has no option with-past; it has: dtype, index; onnx, onnx-dense, onnx-packed have it"
    assert said in " ".join(refused.err.split())
    refused = command("export", locked_model, "--format", "cutlass", "--index", "int32", "-o", tmp_path / "x")
    assert "cutlass has no option index; it has: dtype; coordinates has it" in refused.err


def test_a_value_that_an_option_does_not_take_is_refused(installed, locked_model, tmp_path):
    with pytest.raises(UsageError, match="coordinates: index must be one of int32, int64, got int8"):
        spp_fx.export(locked_model, tmp_path / "x", installed, index="int8")
    with pytest.raises(
        UsageError, match="cutlass: dtype must be one of float32, float16, bfloat16, got float8"
    ):
        spp_fx.export(locked_model, tmp_path / "x", "cutlass", dtype="float8")


def change(out: Path, edit) -> None:
    """Change the tensors of an export."""
    (path,) = out.glob("*.safetensors")
    rewrite(path, edit)


def renew_digest(out: Path) -> None:
    """What somebody would do who changes an export and its manifest with it."""
    (path,) = out.glob("*.safetensors")
    manifest = json.loads((out / "export.json").read_text())
    manifest["files"][path.name] = sha256(path)
    (out / "export.json").write_text(json.dumps(manifest))


def test_a_damaged_copy_fails(installed, locked_model, tmp_path):
    out = spp_fx.export(locked_model, tmp_path / "out", installed).out
    name = read_manifest(out).tensors[0].name
    change(out, lambda values: values[f"{name}.values"][3].fill_(0))
    with pytest.raises(FormatError, match="has changed since it was exported"):
        verify(out)
    renew_digest(out)
    assert [site.name for site in verify(out).sites if not site.ok] == [name]

    change(out, lambda values: values[f"{name}.positions"][3].fill_(0))
    renew_digest(out)
    with pytest.raises(FormatError, match=rf"{name}\.positions: do not ascend"):
        verify(out)
    change(out, lambda values: values.pop(f"{name}.positions"))
    renew_digest(out)
    with pytest.raises(SppFxError, match=rf"{name}\.positions"):
        verify(out)
