import struct

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.parallel import sharing
from spp_fx.sparsity import scan as scan_module
from spp_fx.sparsity.kernels import element_type
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Unstructured, parse_pattern, scan_bits
from spp_fx.sparsity.scan import pack_mask, scan_file, scan_stored, scan_tensor
from spp_fx.storage.safetensors import Shard
from tests.effort import examples

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]

shapes = st.lists(st.integers(1, 37), min_size=2, max_size=3).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def sparse(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).clamp(-3, 3) * 30
    return (values * (torch.rand(shape, generator=generator) < 0.5)).to(dtype)


def non_zero(weight: torch.Tensor) -> np.ndarray:
    exact = weight.to(torch.float64) if weight.is_floating_point() else weight
    return (exact != 0).numpy()


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8 + INTEGERS, ids=str)
@given(seed=seeds, shape=shapes)
@examples(5)
def test_the_mask_is_where_the_weight_is_not_zero(dtype, seed, shape):
    weight = sparse(seed, shape, dtype)
    mask = pack_mask(weight)
    assert mask.shape == shape
    assert np.array_equal(mask.to_bool(), non_zero(weight))
    assert mask.nnz == non_zero(weight).sum()
    assert mask == PackedMask.from_bool(non_zero(weight))
    assert mask.digest == PackedMask.from_bool(non_zero(weight)).digest


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8, ids=str)
def test_every_bit_pattern_of_a_float_is_classified(dtype):
    width = element_type(dtype).itemsize
    patterns = np.arange(2 ** min(16, 8 * width), dtype=np.uint64)
    patterns = (patterns << np.uint64(max(0, 8 * width - 16))) | (patterns & np.uint64(1))
    weight = torch.from_numpy(patterns.astype(f"u{width}").view(np.uint8)).view(dtype).reshape(16, -1)
    scan = scan_tensor(weight)
    values = weight.to(torch.float64)
    # float64 subnormals survive a comparison on the CPU; narrower ones are normal numbers in float64.
    assert np.array_equal(scan.mask.to_bool(), (values != 0).numpy())
    non_finite = torch.nonzero(~torch.isfinite(values))
    assert scan.non_finite == len(non_finite)
    assert scan.first_non_finite == (tuple(non_finite[0].tolist()) if len(non_finite) else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_negative_zero_is_zero_and_nan_infinity_and_subnormals_are_not(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("-inf"), tiny / 2, -tiny]], dtype=dtype)
    scan = scan_tensor(weight)
    assert scan.mask.to_bool().tolist() == [[False, False, True, True, True, True]]
    assert (scan.non_finite, scan.first_non_finite) == (2, (0, 2))


@given(seed=seeds, shape=shapes)
def test_transposed_storage_gives_the_mask_of_the_canonical_weight(seed, shape):
    weight = sparse(seed, shape)
    canonical = weight.transpose(-1, -2)
    assert pack_mask(weight, transposed=True) == pack_mask(canonical)
    assert pack_mask(weight, transposed=True).digest == pack_mask(canonical.contiguous()).digest


@given(seed=seeds, shape=shapes, transposed=st.booleans(), dtype=st.sampled_from(["BF16", "F32", "F64"]))
@examples(10)
def test_a_file_and_memory_give_the_same_scan(tmp_path_factory, seed, shape, transposed, dtype):
    torch_dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[dtype]
    weight = sparse(seed, shape, torch_dtype)
    weight.view(-1)[seed % weight.numel()] = float("inf")
    path = tmp_path_factory.mktemp("file") / "weights"
    path.write_bytes(b"\xff" * 13 + weight.view(torch.uint8).numpy().tobytes() + b"\xff" * 5)
    from_file = scan_file(path, 13, shape, dtype, transposed=transposed)
    from_memory = scan_tensor(weight, transposed=transposed)
    assert from_file == from_memory
    assert from_file.mask.digest == from_memory.mask.digest
    index = from_file.first_non_finite
    assert weight[(*index[:-2], index[-1], index[-2]) if transposed else index] == float("inf")


@pytest.mark.parametrize("at", [0, 63, 64, 700, 1999])
def test_a_non_finite_is_named_wherever_it_stands(tmp_path, monkeypatch, at):
    """In the first word or a later one, in a later chunk, among the last elements, which fill no word."""
    monkeypatch.setattr(scan_module, "_CHUNK", 1 << 10)
    weight = torch.ones(4, 500, dtype=torch.bfloat16)
    weight.view(-1)[at] = float("nan")
    path = tmp_path / "weights"
    path.write_bytes(weight.view(torch.uint8).numpy().tobytes())
    for scan in (scan_file(path, 0, (4, 500), "BF16"), scan_tensor(weight)):
        assert (scan.non_finite, scan.first_non_finite) == (1, divmod(at, 500))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_chunks_regions_and_threads_do_not_change_the_answer(tmp_path, monkeypatch, threads, transposed):
    monkeypatch.setattr(scan_module, "_CHUNK", 1 << 10)
    monkeypatch.setattr(scan_module, "_REGION", 1 << 12)
    weight = sparse(3, (2, 131, 77))
    weight[1, 5, 6] = weight[1, 7, 7] = float("nan")
    path = tmp_path / "weights"
    path.write_bytes(weight.view(torch.uint8).numpy().tobytes())
    with sharing(threads):
        scan = scan_file(path, 0, (2, 131, 77), "BF16", transposed=transposed)
    canonical = weight.transpose(1, 2) if transposed else weight
    assert np.array_equal(scan.mask.to_bool(), (canonical != 0).numpy())
    assert scan.mask.digest == PackedMask.from_bool((canonical != 0).numpy()).digest
    assert scan.mask.nnz == (weight != 0).sum()
    assert (scan.non_finite, scan.first_non_finite) == (2, (1, 6, 5) if transposed else (1, 5, 6))


def test_views_are_read_through_their_strides():
    weight = sparse(0, (40, 30))
    assert np.array_equal(pack_mask(weight[3:, 1::2]).to_bool(), (weight[3:, 1::2] != 0).numpy())
    parameter = torch.nn.Parameter(weight)
    assert pack_mask(parameter) == pack_mask(weight)


def test_a_weight_without_elements_has_an_empty_mask():
    mask = pack_mask(torch.zeros(3, 0))
    assert (mask.nnz, mask.sparsity, mask.bits.size) == (0, 0.0, 0)
    assert scan_bits(mask, parse_pattern("2:4")).count == 0


def test_the_first_of_several_non_finites_is_named():
    weight = torch.ones(3, 4, dtype=torch.float16)
    assert (scan_tensor(weight).non_finite, scan_tensor(weight).first_non_finite) == (0, None)
    weight[1, 2] = float("nan")
    weight[2, 0] = float("inf")
    assert (scan_tensor(weight).non_finite, scan_tensor(weight).first_non_finite) == (2, (1, 2))


def test_a_tensor_of_a_shard_is_scanned_by_its_name(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {"a": sparse(1, (9, 8)), "b": sparse(2, (8, 24))}
    save_file(weights, path)
    shard = Shard.open(path)
    assert scan_stored(shard, "b") == scan_tensor(weights["b"])
    assert scan_stored(shard, "b", transposed=True) == scan_tensor(weights["b"], transposed=True)
    with pytest.raises(UsageError, match="holds no tensor 'c'"):
        scan_stored(shard, "c")


def test_a_file_that_ends_early_is_named(tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(100))
    with pytest.raises(FormatError, match=r"short\.safetensors: the file ends at byte 100"):
        scan_file(path, 8, (8, 8), "BF16")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "C64", "", "bf16"])
def test_a_type_without_readable_zeros_is_refused(tmp_path, dtype):
    with pytest.raises(FormatError, match="supported: F64"):
        scan_file(tmp_path / "none", 0, (2, 2), dtype)


def test_only_dense_matrices_are_scanned():
    with pytest.raises(FormatError, match="2 dimensions"):
        pack_mask(torch.zeros(4))
    with pytest.raises(FormatError, match="no dense data"):
        pack_mask(torch.zeros(4, 4, device="meta"))
    with pytest.raises(FormatError, match="no dense data"):
        pack_mask(torch.eye(4).to_sparse())


def test_the_digest_is_the_documented_one():
    mask = PackedMask.from_bool(np.array([[True, False, True], [False, False, True]]))
    assert mask.bits.tolist() == [0b100101]
    assert mask.digest == blake3(struct.pack("<qq", 2, 3) + bytes([0b100101])).hexdigest()
    # The message and its digest by another implementation, so that the wheel does not check itself.
    assert mask.digest == "0498448cc34b5fd5901729109b8589d75b92d44e42722af27b187cb8eb19d6a4"
    assert PackedMask((3, 2), mask.bits).digest != mask.digest, "the shape is part of it"


@pytest.mark.parametrize(
    ("shape", "bits"),
    [((3, 3), [0, 2]), ((3, 3), [0]), ((3, 3), [0, 0, 0]), ((9,), [0, 0]), ((1, 1, 3, 3), [0, 0])],
)
def test_bits_that_do_not_belong_to_the_shape_are_refused(shape, bits):
    with pytest.raises(MaskError):
        PackedMask(shape, np.array(bits, dtype=np.uint8))


def test_a_mask_cannot_be_changed_in_place():
    mask = PackedMask.from_bool(np.ones((2, 8), dtype=bool))
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0] = 0


# --- violations


@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    experts=st.integers(0, 3),
    pattern=st.sampled_from(["1:2", "2:4", "4:8", "2:8", "1:16", "7:32", "40:64", "3:5", "4:7"]),
)
def test_violations_are_groups_with_too_many_non_zeros(seed, shape, experts, pattern):
    nm = parse_pattern(pattern)
    full = (*([experts] if experts else []), shape[0], shape[1] * nm.group)
    ones = np.random.default_rng(seed).random(full) < nm.kept / nm.group
    counts = ones.reshape(-1, shape[1], nm.group).sum(axis=-1)
    over = np.argwhere(counts > nm.kept)
    found = scan_bits(PackedMask.from_bool(ones), nm)
    assert found.count == len(over)
    if len(over):
        row, group = over[0].tolist()
        expert = f"expert {row // shape[0]}, " if experts else ""
        columns = f"columns {group * nm.group}-{(group + 1) * nm.group - 1}"
        assert found.position == f"{expert}row {row % shape[0]}, {columns}"
        assert found.nonzeros == counts[row, group]
    else:
        assert found.position is None


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 4096), ("3:5", 4095), ("40:63", 4095)])
def test_a_violation_far_into_a_large_mask_is_named(pattern, columns):
    nm = parse_pattern(pattern)
    ones = np.zeros((6000, columns), dtype=bool)
    ones[5321, 4 * nm.group : 5 * nm.group] = True
    ones[5998, : nm.group] = True
    found = scan_bits(PackedMask.from_bool(ones), nm)
    assert found.count == 2
    assert found.position == f"row 5321, columns {4 * nm.group}-{5 * nm.group - 1}"
    assert found.nonzeros == nm.group


def test_a_violation_reads_as_a_sentence():
    weight = torch.zeros(18, 68)
    weight[17, 64:67] = 1
    pattern = parse_pattern("2:4")
    violations = scan_bits(pack_mask(weight), pattern)
    assert violations.describe(pattern) == "row 17, columns 64-67 hold 3 non-zeros, 2:4 allows 2"
    assert scan_bits(pack_mask(weight), parse_pattern("3:4")).describe(pattern) == "holds 2:4"


def test_an_input_dimension_that_does_not_split_is_refused():
    with pytest.raises(PatternError, match=r"multiple of 4, shape \(2, 6\) has 6"):
        scan_bits(pack_mask(torch.zeros(2, 6)), parse_pattern("2:4"))


@pytest.mark.parametrize(("zeros", "missing"), [(9, 0), (10, 0), (8, 1), (0, 9)])
def test_an_unstructured_share_asks_for_whole_zeros_of_every_row(zeros, missing):
    ones = np.ones((3, 7), dtype=bool)  # floor(3.5) = 3 zeros a row
    ones.reshape(-1)[:zeros] = False
    pattern = parse_pattern("50%")
    assert isinstance(pattern, Unstructured)
    found = scan_bits(PackedMask.from_bool(ones), pattern)
    assert (found.count, found.position) == (missing, None)
    if missing:
        assert found.describe(pattern) == f"{missing} zeros are missing for 50%"
