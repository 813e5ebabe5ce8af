"""The documents on formats are complete: every format is named, and the specification is enough for a reader."""

import json
import re
from math import prod
from pathlib import Path

import numpy as np

import spp_fx
from spp_fx.exporters.format import FORMATS
from spp_fx.exporters.manifest import read_manifest
from spp_fx.sparsity.lock import load_lock

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_names_every_format():
    rows = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "formats.md").read_text(), re.MULTILINE)
    assert len(set(rows)) == len(rows)
    assert set(FORMATS.built_in) <= set(rows)


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


def test_the_specification_is_enough_to_write_a_reader(locked_model, tmp_path):
    out = spp_fx.export(locked_model, tmp_path / "out", "sparse-bitmask").out
    for path in (out / "sparse").glob("*.safetensors"):
        assert give_back(path) == (locked_model / path.name).read_bytes()


def test_the_specification_names_what_the_files_hold(locked_model, tmp_path):
    """Keys, versions and names of the document are those of a real export."""
    out = spp_fx.export(locked_model, tmp_path / "out", "sparse-bitmask").out
    words = (DOCS / "sparse-bitmask.md").read_text()
    raw = (out / "sparse" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__")
    assert list(metadata) == re.findall(r"^\| `(format|version|header)` \|", words, re.MULTILINE)
    assert f"| `version` | `{metadata['version']}` |" in words
    assert read_manifest(out).requirements == {"version": 1, "model_has_lock": 1}
    for entry in load_lock(locked_model / "sparsity.lock.json").sites:
        assert entry.name not in header
        assert header[f"{entry.name}.bitmask"]["shape"] == [-(-prod(entry.shape) // 8)]
        assert header[f"{entry.name}.values"]["dtype"] == "BF16"
