"""The documents on formats do as they say: the example runs as written, the specification is enough."""

import json
import re
import shutil
import sys
import tomllib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

import spp_fx
from spp_fx.errors import FormatError, SppFxError
from spp_fx.exporters.format import FORMATS, ExportSettings
from spp_fx.exporters.manifest import read_manifest, sha256
from spp_fx.sparsity.lock import load_lock
from spp_fx.verbs.verify import verify
from tests.command import command, must, rewrite, tensors
from tests.exporters.test_cusparselt import model_folder

DOCS = Path(__file__).parents[2] / "docs"
BUILT_IN = frozenset(FORMATS)


def block(language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / "formats.md").read_text(), re.DOTALL)
    return code


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with its lock, in bfloat16."""
    root = tmp_path_factory.mktemp("doc")
    folder = model_folder(root / "m", dtype=torch.bfloat16)
    lock = spp_fx.export(folder, root / "plain", "safetensors").out / "sparsity.lock.json"
    shutil.copy(lock, folder)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example as an installed package: its file and its entry point, both from the document."""
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


def test_the_example_runs_as_written(installed, model, tmp_path):
    out = tmp_path / "out"
    data = must("export", model, "--format", installed, "-o", out, "--json", "-q").json
    assert data["format"] == "coordinates"
    assert data["checks"] == {"tensors_equal": len(tensors(model)), "masks_equal": 7}
    assert must("verify", out, "--json", "-q").json["kind"] == "coordinates"
    must("verify", out, "--against", model)

    must("unpack", out, "-o", tmp_path / "back")
    ours, theirs = tensors(tmp_path / "back"), tensors(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    half = spp_fx.export(model, tmp_path / "half", installed, ExportSettings(dtype="float16"))
    assert half.manifest.tensors[0].dtype == "F16"
    refused = command("export", model, "--format", installed, "--with-past", "-o", tmp_path / "x")
    assert "--with-past is no option of --format coordinates" in refused.err


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


def test_the_example_fails_on_a_damaged_copy(installed, model, tmp_path):
    out = spp_fx.export(model, tmp_path / "out", installed).out
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


def test_the_example_is_as_short_as_it_says():
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 55


def test_the_table_names_every_format():
    rows = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "formats.md").read_text(), re.MULTILINE)
    assert len(set(rows)) == len(rows)
    assert set(BUILT_IN) <= set(rows)


def give_back(path: Path) -> bytes:
    """A weight file out of a compact one, from the words of docs/sparse-bitmask.md alone."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    ours = json.loads(raw[8:start])
    header = ours["__metadata__"]["header"].encode()
    data = {k: raw[slice(*(start + o for o in v["data_offsets"]))] for k, v in ours.items() if k[:2] != "__"}
    out = [len(header).to_bytes(8, "little"), header]
    theirs = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
    for name, info in sorted(theirs.items(), key=lambda item: item[1]["data_offsets"]):
        if name not in data:
            elements = prod(info["shape"])
            mask = np.frombuffer(data[f"{name}.bitmask"], np.uint8)
            where = np.unpackbits(mask, count=elements, bitorder="little").astype(bool)
            size = (info["data_offsets"][1] - info["data_offsets"][0]) // elements
            dense = np.zeros((elements, size), np.uint8)
            dense[where] = np.frombuffer(data[f"{name}.values"], np.uint8).reshape(-1, size)
            data[name] = dense.tobytes()
        out.append(data[name])
    return b"".join(out)


def test_the_specification_is_enough_to_write_a_reader(model, tmp_path):
    out = spp_fx.export(model, tmp_path / "out", "sparse-bitmask").out
    for path in (out / "sparse").glob("*.safetensors"):
        assert give_back(path) == (model / path.name).read_bytes()


def test_the_specification_names_what_the_files_hold(model, tmp_path):
    """Keys, versions and names of the document are those of a real export."""
    out = spp_fx.export(model, tmp_path / "out", "sparse-bitmask").out
    words = (DOCS / "sparse-bitmask.md").read_text()
    raw = (out / "sparse" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__")
    assert list(metadata) == re.findall(r"^\| `(format|version|header)` \|", words, re.MULTILINE)
    assert f"| `version` | `{metadata['version']}` |" in words
    assert read_manifest(out).requirements == {"version": 1, "model_has_lock": 1}
    for entry in load_lock(model / "sparsity.lock.json").sites:
        assert entry.name not in header
        assert header[f"{entry.name}.bitmask"]["shape"] == [-(-prod(entry.shape) // 8)]
        assert header[f"{entry.name}.values"]["dtype"] == "BF16"
