"""cutlass exports: what is packed is decoded and equal, what is not says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spp_fx.errors import FormatError, MaskError, PatternError
from spp_fx.exporters import cutlass_layout
from spp_fx.exporters.format import FORMATS
from spp_fx.exporters.manifest import read_manifest
from spp_fx.storage.safetensors import Shard
from spp_fx.verbs.export import Exported, export
from spp_fx.verbs.verify import verify
from tests.exporters.packing import bare_folder, bits_of, random_sparse

SITES = {
    "a.weight": random_sparse(64, 128, torch.bfloat16, 1),
    "b.weight": random_sparse(96, 64, torch.bfloat16, 2),
    "c.weight": random_sparse(32, 192, torch.bfloat16, 3),
}
OTHERS = {"norm": torch.ones(7, dtype=torch.bfloat16), "ids": torch.arange(5)}


def exported(
    folder: Path, sites: dict[str, Tensor], transposed: frozenset[str] = frozenset(), dtype: str | None = None
) -> Exported:
    model = bare_folder(folder / "m", sites, OTHERS, transposed)
    return export(model, folder / "out", "cutlass", dtype=dtype)


def test_sites_are_packed_and_the_rest_is_copied(tmp_path):
    done = exported(tmp_path, SITES, frozenset({"b.weight"}))
    checks = {"cutlass": 3, "dense": 0, "bit_exact": 3, "tensors_equal": 2, "masks_equal": 3}
    assert done.checks == checks | {"signs_of_zeros_lost": 0}
    written = load_file(tmp_path / "out" / "packed.safetensors")
    for name, weight in SITES.items():
        packed, meta = cutlass_layout.pack(weight)
        assert torch.equal(bits_of(written[f"{name}.packed"]), bits_of(packed))
        assert torch.equal(written[f"{name}.meta"], meta)
    assert set(written) == {f"{name}.{part}" for name in SITES for part in ("packed", "meta")} | set(OTHERS)
    dense = sum(weight.nbytes for weight in SITES.values())
    assert done.manifest.sizes["dense_bytes"] == dense
    assert done.manifest.sizes["sites_bytes"] == 0.5625 * dense
    assert done.manifest.requirements["compute_capability"] == "8.x"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_given_back_as_the_model_stores_it(tmp_path, dtype):
    group = cutlass_layout.FORMS[dtype].group
    sites = {name: random_sparse(64, 256, dtype, seed, group) for seed, name in enumerate(SITES)}
    done = exported(tmp_path, sites, frozenset({"c.weight"}))
    assert done.checks["cutlass"] == done.checks["bit_exact"] == 3
    decode = FORMATS["cutlass"].decode
    assert decode is not None
    decoded = decode(tmp_path / "out", done.manifest)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == decoded.shapes
    for name, value in stored.items():
        assert torch.equal(bits_of(decoded.read(name)), bits_of(value))


def test_what_cannot_be_packed_stays_dense_and_says_why(tmp_path):
    sites = {
        "a.weight": SITES["a.weight"],
        "b.weight": random_sparse(40, 64, torch.bfloat16, 4),
        "c.weight": random_sparse(64, 64, torch.float32, 5),
        "d.weight": torch.ones(32, 64, dtype=torch.bfloat16) * (torch.arange(64) % 8 < 4),
        "e.weight": torch.zeros(2, 32, 64, dtype=torch.bfloat16),
    }
    sites["e.weight"][:, :, ::2] = 1
    done = exported(tmp_path, sites)
    reasons = {tensor.name: tensor.reason for tensor in done.manifest.tensors}
    assert reasons["a.weight"] is None
    assert "shape 40 x 64" in reasons["b.weight"]
    assert "it is 2:4: --dtype bfloat16 packs it" in reasons["c.weight"]
    assert reasons["d.weight"] == "it is not 2:4"
    assert "stack" in reasons["e.weight"]
    assert done.checks["cutlass"] == 1
    assert done.checks["dense"] == 4
    assert done.checks["bit_exact"] == done.checks["masks_equal"] == 5


def test_rounding_makes_a_float32_weight_packable(tmp_path):
    sites = {"a.weight": random_sparse(64, 64, torch.float32, 5)}
    done = exported(tmp_path, sites, dtype="bfloat16")
    assert done.checks["cutlass"] == 1
    packed = load_file(tmp_path / "out" / "packed.safetensors")["a.weight.packed"]
    assert packed.dtype == torch.bfloat16


def test_nothing_to_pack_is_an_error(tmp_path):
    with pytest.raises(PatternError, match=r"no weight can be packed: .* shape 40 x 64: .* \(1 of 1\)"):
        exported(tmp_path, {"a.weight": random_sparse(40, 64, torch.bfloat16, 4)})
    assert not (tmp_path / "out").exists()


def test_signs_of_zeros_are_kept_where_a_slot_is_free_and_counted_where_not(tmp_path):
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[:, ::4] = 1
    weight[:, 1::8] = 2
    weight[5, 2], weight[5, 7], weight[6, 5] = -0.0, -0.0, -0.0  # the first finds its group full
    done = exported(tmp_path, {"a.weight": weight, "b.weight": SITES["a.weight"]})
    first = done.manifest.tensors[0]
    assert first.negative_zeros == 1
    assert done.checks["signs_of_zeros_lost"] == 1
    decoded = FORMATS["cutlass"].decode(tmp_path / "out", done.manifest).read("a.weight")
    expected = weight.clone()
    expected[5, 2] = 0
    assert torch.equal(bits_of(decoded), bits_of(expected))


def test_a_fault_of_the_writers_order_is_found(tmp_path, monkeypatch):
    right = cutlass_layout.fill_tiles

    def swapped(units, meta):
        right(units, meta)
        meta.copy_(meta.flip(-1).clone())

    monkeypatch.setattr(cutlass_layout, "fill_tiles", swapped)
    with pytest.raises(MaskError, match=r"a\.weight: decoded from the export, it is not the model's weight"):
        exported(tmp_path, SITES)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    exported(root, SITES)
    return root / "out"


def test_the_writer_is_found_by_verify(good):
    verdict = verify(good)
    assert verdict.ok
    assert verdict.kind == "cutlass"
    assert [site.nnz for site in verdict.sites] == [int((w != 0).sum()) for w in SITES.values()]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"layout": "cusparselt"}, r"tensors\.0\.layout: 'cusparselt', expected one of cutlass, dense"),
        ({"dtype": "F64"}, r"tensors\.0\.layout: 'cutlass', which is not possible: .* float64"),
        ({"dtype": "I8"}, r"a\.weight\.packed is BF16 \[64, 64\], expected I8"),
        ({"layout": "dense"}, r"holds no tensor a\.weight, export\.json says it does"),
    ],
)
def test_export_json_is_not_believed(tmp_path, good, edit, message):
    folder = shutil.copytree(good, tmp_path / "out")
    path = folder / "export.json"
    data = json.loads(path.read_text())
    data["tensors"][0] |= edit
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        verify(folder)


def test_damaged_metadata_is_named_with_its_file(tmp_path, good):
    folder = shutil.copytree(good, tmp_path / "out")
    info = Shard.open(folder / "packed.safetensors").info("a.weight.meta")
    with (folder / "packed.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(b"\0")
    decode = FORMATS["cutlass"].decode
    decoded = decode(folder, read_manifest(folder, check_files=False))
    with pytest.raises(FormatError, match=r"packed\.safetensors: a\.weight: row 0, columns 0-3 have the pos"):
        decoded.read("a.weight")
