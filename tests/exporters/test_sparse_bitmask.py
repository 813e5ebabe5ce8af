"""sparse-bitmask exports: any weight comes back bit for bit, and what is damaged is refused by name."""

import json
import math
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spp_fx.errors import FormatError, MaskError, SppFxError
from spp_fx.exporters import sparse_bitmask
from spp_fx.exporters.format import Source
from spp_fx.exporters.manifest import read_manifest
from spp_fx.exporters.sparse_bitmask import CompactShard, SparseBitmask
from spp_fx.sparsity.lock import Lock, load_lock, make_entry
from spp_fx.sparsity.scan import scan_tensor
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard, dtype_name
from spp_fx.verbs.export import export
from spp_fx.verbs.unpack import unpack
from spp_fx.verbs.verify import verify
from tests.command import listing
from tests.effort import examples
from tests.exporters.packing import without_kernels
from tests.exporters.test_cusparselt import model_folder

SITE = "model.layers.0.mlp.up_proj.weight"
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
fast = examples(15)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weight(seed: int, shape: tuple[int, ...], dtype: torch.dtype, keep: str) -> Tensor:
    """A weight of a pattern, whose kept entries are any bits that are no NaN and no infinity."""
    generator = np.random.default_rng(seed)
    numel, size = math.prod(shape), torch.zeros(0, dtype=dtype).element_size()
    if not numel:
        return torch.zeros(shape, dtype=dtype)
    values = torch.tensor(generator.integers(0, 256, numel * size), dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        wide = values.to(torch.float64)
        values = torch.where(wide.isfinite(), wide, torch.tensor(-0.0, dtype=torch.float64)).to(dtype)
    share = {"none": 0.0, "half": 0.5, "few": 0.05, "all": 1.0}.get(keep, 1.0)
    mask = torch.from_numpy(generator.random(numel) < share)
    if keep == "2:4":
        mask = torch.arange(numel) % 4 < 2
    elements = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    return (elements * mask).view(dtype).reshape(shape)


def compact(folder: Path, tensors: dict[str, Tensor], sites: list[str]) -> Path:
    """A folder of these tensors in its compact form, as the format's own `write` makes it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "m").mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "m" / "config.json").write_text("{}")
    save_file(tensors, folder / "m" / "model.safetensors", {"format": "pt"})
    lock = Lock.of(make_entry(n, "linear", scan_tensor(tensors[n]).mask, None) for n in sites)
    source = Source(ModelFolder.open(folder / "m"), lock, False)
    silent = [].append
    SparseBitmask().write(source, folder / "out", lambda *_: None, silent)
    return folder / "out"


@fast
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.one_of(
        st.tuples(st.integers(0, 9), st.integers(0, 40)),
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 24)),
    ),
    dtype=st.sampled_from(DTYPES),
    keep=st.sampled_from(["none", "few", "half", "2:4", "all"]),
)
def test_any_weight_comes_back_bit_for_bit(tmp_path_factory, seed, shape, dtype, keep):
    folder = tmp_path_factory.getbasetemp() / "any"
    tensors = {"a.weight": weight(seed, shape, dtype, keep), "b.bias": torch.arange(3)}
    out = compact(folder, tensors, ["a.weight"])
    manifest = read_manifest(out)
    decoded = SparseBitmask.decode(out, manifest).read("a.weight")
    assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
    assert bits(decoded) == bits(tensors["a.weight"])
    (record,) = manifest.tensors
    stored = (out / "sparse" / "model.safetensors").stat().st_size
    assert (record.layout == "dense") == (record.reason is not None)
    assert stored < 2000 + sum(tensor.nbytes for tensor in tensors.values()), "no site grows"

    (folder / "back").mkdir()
    SparseBitmask.restore(out, manifest, folder / "back", lambda *_: None)
    original = (folder / "m" / "model.safetensors").read_bytes()
    assert (folder / "back" / "model.safetensors").read_bytes() == original


def test_spans_meet_where_they_should(tmp_path, monkeypatch):
    """Weights of many spans, by threads; with the numpy kernels the very same bytes."""
    monkeypatch.setattr(sparse_bitmask, "SPAN", 1 << 10)
    tensors = {
        "a.weight": weight(1, (331, 77), torch.bfloat16, "half"),
        "b.weight": weight(2, (100, 129), torch.float32, "few"),
    }
    out = compact(tmp_path / "x", tensors, list(tensors))
    for name, tensor in tensors.items():
        assert bits(SparseBitmask.decode(out, read_manifest(out)).read(name)) == bits(tensor)
    written = (out / "sparse" / "model.safetensors").read_bytes()
    with without_kernels():
        other = compact(tmp_path / "y", tensors, list(tensors))
        assert (other / "sparse" / "model.safetensors").read_bytes() == written
        for name, tensor in tensors.items():
            assert bits(SparseBitmask.decode(other, read_manifest(other)).read(name)) == bits(tensor)


def test_packing_and_restoring_take_the_memory_of_a_mask_and_a_few_spans(tmp_path, monkeypatch):
    """Of a tensor of 32 MiB its mask of 2 MiB is held, in both directions."""
    tensor = torch.ones(4096, 4096, dtype=torch.bfloat16)
    tensor.view(-1, 4)[:, :2] = 0
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": tensor}, tmp_path / "model.safetensors", {"format": "pt"})
    lock = Lock.of([make_entry("a.weight", "linear", scan_tensor(tensor).mask, None)])
    source, target = (
        Source(ModelFolder.open(tmp_path), lock, False),
        tmp_path / "sparse" / "model.safetensors",
    )
    monkeypatch.setattr(sparse_bitmask, "SPAN", 1 << 16)

    def pack():
        sparse_bitmask.write_shard(source, source.folder.shards[0], target, lambda *_: None)

    def back():
        shard = CompactShard.open(target, target.name)
        with (tmp_path / "back.safetensors").open("wb") as file:
            file.write(shard.original.raw)
            for name in shard.tensors:
                for block in shard.blocks(name):
                    file.write(block.data)

    for action in (pack, back):
        tracemalloc.start()
        action()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_size_at_2_4_in_bfloat16(tmp_path):
    dense = torch.rand(256, 512).add(1).bfloat16()
    dense.view(-1, 4)[:, 1:3] = 0
    out = compact(tmp_path, {"a.weight": dense}, ["a.weight"])
    sizes = read_manifest(out).sizes
    assert sizes["sites_bytes"] / sizes["dense_bytes"] == 0.5625


def test_zeros_of_negative_sign_are_values_and_still_zeros(tmp_path):
    tensor = torch.zeros(4, 64)
    tensor[0, :8] = -0.0
    tensor[1, 3] = 2.0
    out = compact(tmp_path, {"a.weight": tensor}, ["a.weight"])
    manifest = read_manifest(out)
    assert manifest.tensors[0].details["values"] == 9
    assert SparseBitmask.read(out, manifest).scan("a.weight", False).mask.nnz == 1
    assert SparseBitmask.decode(out, manifest).read("a.weight").signbit().sum() == 8


def test_a_site_whose_parts_have_the_name_of_a_tensor_stays_dense(tmp_path):
    tensors = {"a": torch.eye(64), "a.values": torch.ones(3)}
    out = compact(tmp_path, tensors, ["a"])
    assert "tensor of the name a.values" in read_manifest(out).tensors[0].reason
    assert bits(SparseBitmask.decode(out, read_manifest(out)).read("a")) == bits(tensors["a"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A model in two shards and an index, with a lock and other files."""
    root = tmp_path_factory.mktemp("sharded")
    model = model_folder(root / "m", dtype=torch.bfloat16)
    values = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: values[name] for name in sorted(values)[number - 1 :: 2]}
        save_file(part, model / file, {"format": "pt", "note": f"é {number}"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "notes").mkdir()
    (model / "notes" / "a.txt").write_text("kept")
    lock = export(model, root / "plain", "safetensors").out / "sparsity.lock.json"
    shutil.copy(lock, model)
    return model


@pytest.fixture(scope="module")
def packed(sharded) -> Path:
    """The model of `sharded` as an export."""
    return export(sharded, sharded.parent / "packed", "sparse-bitmask").out


@pytest.fixture
def out(packed, tmp_path) -> Path:
    """A copy of the export that a test may damage."""
    return shutil.copytree(packed, tmp_path / "out")


def test_the_folder_comes_back_byte_for_byte(sharded, tmp_path):
    done = export(sharded, tmp_path / "out", "sparse-bitmask")
    assert done.checks["bit_exact"] == done.checks["masks_equal"] == 7
    assert done.checks["tensors_equal"] == len(ModelFolder.open(sharded).names) - 7
    assert done.manifest.sizes["sites_bytes"] / done.manifest.sizes["dense_bytes"] < 0.57
    unpacked = unpack(tmp_path / "out", tmp_path / "back")
    assert unpacked.exact
    assert listing(tmp_path / "back") == listing(sharded)


@pytest.mark.parametrize("has_lock", [True, False])
def test_the_lock_comes_back_only_if_the_model_had_one(sharded, tmp_path, has_lock):
    model = shutil.copytree(sharded, tmp_path / "m")
    lock = model / "sparsity.lock.json"
    if has_lock:
        # Another spelling of the same lock: the bytes come back, not a rewrite of them.
        lock.write_text(json.dumps(json.loads(lock.read_text())))
    else:
        lock.unlink()
    done = export(model, tmp_path / "out", "sparse-bitmask")
    assert done.manifest.requirements["model_has_lock"] == int(has_lock)
    unpack(tmp_path / "out", tmp_path / "back")
    assert listing(tmp_path / "back") == listing(model)


def test_nothing_in_the_folder_looks_like_a_model_to_a_server(packed):
    assert not [*packed.glob("*.safetensors"), *packed.glob("*.safetensors.index.json")]
    assert sorted(path.name for path in (packed / "sparse").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("has_lock", [True, False])
def test_weights_that_are_not_finite_are_refused(sharded, tmp_path, has_lock):
    model = shutil.copytree(sharded, tmp_path / "m")
    if not has_lock:
        (model / "sparsity.lock.json").unlink()
    path = next(shard.path for shard in ModelFolder.open(model).shards if SITE in shard.header.tensors)
    values = load_file(path)
    row, column = values[SITE].nonzero()[0].tolist()
    values[SITE][row, column] = float("nan")
    save_file(values, path, {"format": "pt"})
    with pytest.raises(MaskError, match=re.escape(SITE) + ".*NaN"):
        export(model, tmp_path / "out", "sparse-bitmask")
    assert not (tmp_path / "out").exists()


def test_what_is_written_wrong_is_found(sharded, tmp_path, monkeypatch):
    right = sparse_bitmask.compress

    def wrong(elements, bits):
        values = right(elements, bits)
        values[-1] ^= 1
        return values

    monkeypatch.setattr(sparse_bitmask, "compress", wrong)
    with pytest.raises(FormatError, match=r"weight: elements .* are not the model's"):
        export(sharded, tmp_path / "out", "sparse-bitmask")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A compact file of one site and another tensor."""
    tensor = weight(3, (16, 20), torch.bfloat16, "half")
    folder = tmp_path_factory.mktemp("small")
    return compact(folder, {"a.weight": tensor, "b": torch.ones(3)}, ["a.weight"])


def decode_all(path: Path) -> dict[str, bytes]:
    shard = CompactShard.open(path, path.name)
    return {name: bits(shard.read(name)) for name in shard.tensors}


def damaged(small: Path, target: Path, edit) -> Path:
    """The compact file with its tensors changed and its metadata kept."""
    path = small / "sparse" / "model.safetensors"
    values, metadata = load_file(path), Shard.open(path).header.metadata
    edit(values, metadata)
    save_file({name: value.contiguous() for name, value in values.items()}, target, metadata)
    return target


def header_edit(old: str, new: str):
    def edit(values, metadata):
        assert old in metadata["header"]
        metadata["header"] = metadata["header"].replace(old, new)

    return edit


def flip(values, metadata):
    values["a.weight.bitmask"][5] ^= 4


def zero(values, metadata):
    values["a.weight.values"][7] = 0


def short(values, metadata):
    values["a.weight.values"] = values["a.weight.values"][:-1]


DAMAGE = {
    "one bit": (flip, r"'a\.weight'.* ones for \d+ values"),
    "a value short": (short, r"'a\.weight'.* ones for \d+ values"),
    "a value without a bit": (zero, r"'a\.weight'.*value 7 has no bit set"),
    "mask too short": (
        lambda v, m: v.update({"a.weight.bitmask": v["a.weight.bitmask"][:-1]}), r"a\.weight\.bitmask.*U8 \[39\]",
    ),
    "another dtype": (
        lambda v, m: v.update({"a.weight.values": v["a.weight.values"].float()}), r"a\.weight\.values.*F32",
    ),
    "values in two dimensions": (
        lambda v, m: v.update({"a.weight.values": v["a.weight.values"][None]}), r"a\.weight\.values.*\[1, ",
    ),
    "no values": (lambda v, m: v.pop("a.weight.values"), r"'a\.weight'.*values"),
    "no mask": (lambda v, m: v.pop("a.weight.bitmask"), r"a\.weight\.bitmask.*is missing"),
    "a stray tensor": (lambda v, m: v.update(c=torch.ones(1)), r"'c'.*not a tensor of the model"),
    "no metadata": (lambda v, m: m.clear(), "sparse-bitmask, version 1"),
    "another version": (lambda v, m: m.update(version="2"), "version 1"),
    "a header that is no JSON": (header_edit("{", "["), "header"),
    "another shape": (header_edit("[16,20]", "[16,21]"), "offsets"),
    "a shape below zero": (header_edit("[16,20]", "[-16,20]"), "shape"),
    "a dtype unknown": (header_edit('"BF16"', '"BF17"'), "BF17"),
    "a gap": (header_edit("[12,652]", "[14,654]"), "belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_file_and_tensor(name, small, tmp_path):
    edit, message = DAMAGE[name]
    path = damaged(small, tmp_path / "x.safetensors", edit)
    with pytest.raises(FormatError, match=message) as error:
        decode_all(path)
    assert str(path) in str(error.value)


def test_bits_past_the_last_element_are_refused(tmp_path):
    out = compact(tmp_path, {"a.weight": weight(3, (5, 25), torch.float32, "half")}, ["a.weight"])

    def pad(values, metadata):
        values["a.weight.bitmask"][-1] |= 128

    with pytest.raises(FormatError, match=r"bits set past the last of 125 elements"):
        decode_all(damaged(out, tmp_path / "x.safetensors", pad))


@examples(37)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_random_damage_is_a_format_error_or_changes_values_alone(tmp_path_factory, small, at, value, cut):
    path = small / "sparse" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    place = int(at * len(raw))
    if cut:
        raw = raw[:place]
    else:
        raw[place] ^= value
    bad = tmp_path_factory.getbasetemp() / "bad.safetensors"
    bad.write_bytes(raw)
    refused = None
    try:
        decode_all(bad)
    except FormatError as error:
        refused = str(error)
    if refused is None:
        assert not cut, "a byte of a value or of a name may change, but none may be missing"
    else:
        assert str(bad) in refused


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_an_export_cut_short_fails_verify_and_unpack(out, tmp_path, share):
    path = out / "sparse" / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for action in (lambda: verify(out), lambda: unpack(out, tmp_path / "back")):
        with pytest.raises(FormatError, match="model-00002-of-00002"):
            action()
    assert not (tmp_path / "back").exists()


def test_a_manifest_that_says_something_else_of_a_site_is_refused(out):
    for old, new in (('"layout": "bitmask"', '"layout": "dense"'), ('"dtype": "BF16"', '"dtype": "F16"')):
        text = (out / "export.json").read_text()
        (out / "export.json").write_text(text.replace(old, new, 1))
        with pytest.raises(FormatError, match=r"tensors\.0"):
            verify(out)
        (out / "export.json").write_text(text)
    assert verify(out).ok


def test_a_zero_that_became_a_value_fails_verify(sharded, tmp_path):
    """The files agree with themselves, only not with the lock."""
    model = shutil.copytree(sharded, tmp_path / "m")
    path = model / "model-00001-of-00002.safetensors"
    values = load_file(path)
    name = next(name for name in values if "layers.0" in name and values[name].ndim == 2)
    values[name].view(-1)[int((values[name].view(-1) == 0).int().argmax())] = 1.0
    save_file(values, path, {"format": "pt"})
    bad = tmp_path / "bad"
    bad.mkdir()
    source = Source(ModelFolder.open(model), load_lock(model / "sparsity.lock.json"), False)
    SparseBitmask().write(source, bad, lambda *_: None, [].append)
    verdict = verify(bad)
    assert [site.name for site in verdict.sites if not site.ok] == [name]


def test_types_that_torch_has_not_come_back_too(tmp_path):
    model = model_folder(tmp_path / "m", six=torch.arange(6, dtype=torch.uint8))
    path = model / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(
        b'"six":{"dtype":"U8","shape":[6]', b'"six":{"dtype":"F6_E2M3","shape":[8]'
    )
    assert b"F6_E2M3" in header
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    export(model, tmp_path / "out", "sparse-bitmask")
    unpack(tmp_path / "out", tmp_path / "back")
    assert listing(tmp_path / "back") == listing(model)


def test_sites_of_every_dtype_are_named_as_safetensors_names_them():
    assert [dtype_name(dtype) for dtype in DTYPES] == [
        "F16",
        "BF16",
        "F32",
        "F64",
        "I8",
        "F8_E4M3",
        "F8_E5M2",
    ]


def test_a_model_that_is_an_export_itself_gives_no_manifest_back(tmp_path):
    plain = export(model_folder(tmp_path / "m"), tmp_path / "plain", "safetensors").out
    export(plain, tmp_path / "out", "sparse-bitmask")
    unpack(tmp_path / "out", tmp_path / "back")
    expected = listing(plain)
    del expected["export.json"]
    assert listing(tmp_path / "back") == expected


def test_an_option_of_other_formats_is_refused(tmp_path):
    with pytest.raises(
        SppFxError, match="sparse-bitmask has no option dtype; it has: none; cusparselt, cutlass"
    ):
        export(tmp_path, tmp_path / "out", "sparse-bitmask", dtype="float16")
