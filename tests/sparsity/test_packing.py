"""The codec: unpack(pack(w)) is w bit for bit, compiled or not; misfits are named."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets as cutlass_offsets,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as cutlass_pack,
)

from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.sparsity import packing
from spp_fx.sparsity.kernels import popcount
from spp_fx.sparsity.packing import (
    Packed24,
    clear_negative_zeros,
    compress,
    expand,
    pack_1_2,
    pack_2_4,
    pack_rows,
    unpack_1_2,
    unpack_2_4,
)
from tests.effort import examples
from tests.exporters.packing import without_kernels

BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
}
HALVES = [torch.float16, torch.bfloat16]
SLOTS = [(), (0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]

# Zeros of both signs, the least subnormal, infinities and NaNs with payloads of float16 and bfloat16.
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7C01, 0x7E5A, 0x7F80, 0xFF80, 0x7F81, 0xFFFF]


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype])


@st.composite
def weights_16(draw: st.DrawFn) -> Tensor:
    """(m, k) float16 or bfloat16 of any bits in at most two places a group, +0.0 elsewhere."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    entry = st.sampled_from(SPECIAL) | st.integers(0, 0xFFFF)
    cells: list[int] = []
    for _ in range(rows * groups):
        slots = draw(st.sampled_from(SLOTS))
        cells += [draw(entry) if column in slots else 0 for column in range(4)]
    bits = torch.tensor(cells, dtype=torch.int32).to(torch.int16).view(rows, 4 * groups)
    return bits.view(draw(st.sampled_from(HALVES)))


def random_2_4(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(m, k) with zero to two random entries a group, none of them -0.0."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 100, (m, k), generator=generator).to(dtype)
    order = torch.rand(m, k // 4, 4, generator=generator).argsort(-1)
    kept = torch.randint(0, 3, (m, k // 4, 1), generator=generator)
    bits = bits_of(dense)
    return torch.where((order < kept).view(m, k), bits, torch.zeros_like(bits)).view(dtype)


@examples(37)
@given(weights_16())
def test_unpack_is_the_inverse_of_pack_bit_for_bit(weight: Tensor):
    packed = pack_2_4(weight)
    m, k = weight.shape
    assert packed.shape == (m, k)
    assert packed.values.shape == (m, k // 2)
    assert packed.values.dtype == weight.dtype
    assert packed.positions.shape == (m, -(-k // 8))
    assert packed.positions.dtype == torch.uint8
    assert torch.equal(bits_of(unpack_2_4(packed, k)), bits_of(weight))


@examples(25)
@given(weights_16())
def test_positions_ascend_and_point_at_the_values(weight: Tensor):
    packed = pack_2_4(weight)
    dense, values = bits_of(weight), bits_of(packed.values)
    for row in range(weight.shape[0]):
        for group in range(weight.shape[1] // 4):
            nibble = int(packed.positions[row, group // 2]) >> 4 * (group % 2) & 0xF
            first, second = nibble & 3, nibble >> 2
            assert first < second
            assert values[row, 2 * group] == dense[row, 4 * group + first]
            assert values[row, 2 * group + 1] == dense[row, 4 * group + second]


def test_nibbles_of_every_pattern_of_a_group():
    kept_to_nibble = {
        (): 0xE,
        (0,): 0x8,
        (1,): 0x9,
        (2,): 0xE,
        (3,): 0xE,
        (0, 1): 0x4,
        (0, 2): 0x8,
        (0, 3): 0xC,
        (1, 2): 0x9,
        (1, 3): 0xD,
        (2, 3): 0xE,
    }
    for kept, nibble in kept_to_nibble.items():
        weight = torch.zeros(1, 8, dtype=torch.bfloat16)
        weight[0, list(kept)] = 1.0
        assert int(pack_2_4(weight).positions[0, 0]) == 0xE0 | nibble, kept


def test_a_worked_example():
    weight = torch.tensor([[0, 5, 0, 7, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, -2]], dtype=torch.float16)
    packed = pack_2_4(weight)
    assert packed.values.tolist() == [[5, 7, 0, 0, 3, 0, 0, -2]]
    assert packed.positions.tolist() == [[0xED, 0xE8]]


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_round_trips(dtype: torch.dtype):
    weight = random_2_4(7, 24, dtype)
    assert torch.equal(bits_of(unpack_2_4(pack_2_4(weight), 24)), bits_of(weight))


def test_signalling_nans_of_float32_survive():
    weight = torch.zeros(1, 4, dtype=torch.int32)
    weight[0, 1], weight[0, 3] = 0x7F800001, -0x7FFFFF
    assert torch.equal(bits_of(unpack_2_4(pack_2_4(weight.view(torch.float32)), 4)), weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_nibbles_are_those_of_torchs_cutlass_conversion(dtype: torch.dtype):
    m, k = 64, 96
    weight = random_2_4(m, k, dtype)
    compressed, meta = cutlass_pack(weight)
    packed = pack_2_4(weight)
    assert torch.equal(packed.values, compressed)
    offsets = cutlass_offsets(m, k // 16, meta.dtype, meta.device)
    row_major = meta.view(-1).gather(0, offsets).view(m, k // 16)
    assert torch.equal(packed.positions, row_major.view(torch.uint8))


def test_an_odd_number_of_groups_ends_with_an_empty_nibble():
    weight = torch.tensor([[1, 2, 0, 0, 0, 0, 3, 4, 5, 0, 6, 0]], dtype=torch.float16)
    packed = pack_2_4(weight)
    assert packed.positions.tolist() == [[0xE4, 0xE8]]
    assert torch.equal(unpack_2_4(packed, 12), weight)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]):
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    assert unpack_2_4(pack_2_4(weight), shape[1]).shape == shape


def test_a_transposed_view_packs_like_its_copy():
    weight = random_2_4(32, 16, torch.bfloat16)
    packed, copied = pack_2_4(weight.t().contiguous().t()), pack_2_4(weight)
    assert torch.equal(packed.values, copied.values)
    assert torch.equal(packed.positions, copied.positions)


def test_rows_worked_on_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch):
    weight = random_2_4(23, 20, torch.float16)
    whole = pack_2_4(weight)
    monkeypatch.setattr(packing, "_CHUNK_ENTRIES", 3 * 20)
    packed = pack_2_4(weight)
    assert torch.equal(packed.values, whole.values)
    assert torch.equal(packed.positions, whole.positions)
    assert torch.equal(unpack_2_4(packed, 20), weight)
    weight[17, 8:11] = 1
    weight[17, 11] = 0
    with pytest.raises(PatternError, match=r"row 17, columns 8-11 hold 3 non-zeros, 2:4 allows 2"):
        pack_2_4(weight)


def test_the_first_group_with_too_many_non_zeros_is_named():
    weight = torch.zeros(32, 128, dtype=torch.bfloat16)
    weight[17, 64:67] = 1
    weight[17, 100:104] = 1
    weight[20, 0:4] = 1
    with pytest.raises(PatternError, match=r"row 17, columns 64-67 hold 3 non-zeros, 2:4 allows 2"):
        pack_2_4(weight)


def test_int8_has_no_negative_zero():
    weight = torch.tensor([[-128, -128, -128, 0]], dtype=torch.int8)
    with pytest.raises(PatternError, match="row 0, columns 0-3 hold 3 non-zeros"):
        pack_2_4(weight)
    assert clear_negative_zeros(weight) == (weight, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_a_negative_zero_is_kept_where_a_slot_is_free_and_named_where_none_is(dtype: torch.dtype):
    free = torch.tensor([[-0.0, 0, 0, 3.0]]).to(dtype)
    assert torch.equal(bits_of(unpack_2_4(pack_2_4(free), 4)), bits_of(free))
    full = torch.tensor([[0, 0, 0, 0, 1.0, 0, -0.0, 2.0]]).to(dtype)
    with pytest.raises(PatternError, match=r"row 0, columns 4-7 hold 2 non-zeros and 1 negative .* column 6"):
        pack_2_4(full)
    cleared, count = clear_negative_zeros(full)
    assert count == 1
    assert unpack_2_4(pack_2_4(cleared), 8).tolist() == [[0, 0, 0, 0, 1.0, 0, 0, 2.0]]
    assert bits_of(full)[0, 6] != 0, "the weight given must stay as it is"


def test_clearing_without_negative_zeros_returns_the_weight_itself():
    weight = random_2_4(4, 8, torch.float16)
    cleared, count = clear_negative_zeros(weight)
    assert cleared is weight
    assert count == 0


def test_what_cannot_be_packed_is_refused_with_the_reason():
    with pytest.raises(PatternError, match="10 columns are not a multiple of 4"):
        pack_2_4(torch.zeros(2, 10, dtype=torch.float16))
    with pytest.raises(UsageError, match=r"cannot pack torch\.int32"):
        pack_2_4(torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(UsageError, match="not a matrix"):
        pack_2_4(torch.zeros(2, 2, 8, dtype=torch.float16))


def test_a_packed_form_that_does_not_fit_is_refused():
    packed = pack_2_4(random_2_4(3, 12, torch.float16))
    values, positions = packed.values, packed.positions
    with pytest.raises(FormatError, match="a matrix of 16 columns needs"):
        unpack_2_4(packed, 16)
    with pytest.raises(FormatError, match=r"positions are torch\.uint8 of shape \(3, 1\)"):
        unpack_2_4(Packed24(values, positions[:, :1]), 12)
    with pytest.raises(FormatError, match=r"positions are torch\.int8"):
        unpack_2_4(Packed24(values, positions.view(torch.int8)), 12)
    for nibble in (0x0, 0x1, 0x5, 0xA, 0xF):
        broken = positions.clone()
        broken[1, 0] = nibble << 4 | 0x4
        with pytest.raises(FormatError, match=f"row 1, columns 4-7 have the position nibble 0x{nibble:X}"):
            unpack_2_4(Packed24(values, broken), 12)
    padded = positions.clone()
    padded[2, 1] = padded[2, 1] & 0xF | 0x40
    with pytest.raises(FormatError, match="row 2 ends with the nibble 0x4, padding is 0xE"):
        unpack_2_4(Packed24(values, padded), 12)


@st.composite
def weights_of_any_width(draw: st.DrawFn, groups_of: int = 4) -> Tensor:
    """(m, k) of any dtype and any bits, also more entries a group than there are slots."""
    dtype = draw(st.sampled_from(list(BITS))) if groups_of == 4 else torch.float32
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    bits, width = BITS[dtype], 8 * dtype.itemsize
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    special = torch.tensor([1, -1, -(1 << (width - 1)), (1 << (width - 1)) - 1]).to(bits)
    entries = special[torch.randint(0, 4, (rows, 4 * groups), generator=generator)]
    kept = torch.rand(rows, 4 * groups, generator=generator) < draw(st.sampled_from([0.2, 0.5]))
    return torch.where(kept, entries, torch.zeros_like(entries)).view(dtype)


def outcome(work, *arguments):
    try:
        packed = work(*arguments)
    except PatternError as error:
        return str(error)
    return bits_of(packed.values).tolist(), packed.positions.tolist()


@examples(37)
@given(weights_of_any_width())
def test_compiled_loops_pack_as_torch_does(weight: Tensor):
    """Also where they cannot: the same place is named."""
    compiled = outcome(pack_2_4, weight)
    with without_kernels():
        assert outcome(pack_2_4, weight) == compiled


@examples(25)
@given(weights_of_any_width(groups_of=2))
def test_compiled_loops_pack_pairs_as_torch_does(weight: Tensor):
    compiled = outcome(pack_1_2, weight)
    with without_kernels():
        assert outcome(pack_1_2, weight) == compiled


@examples(25)
@given(weights_of_any_width())
def test_clearing_makes_fit_what_only_signs_kept_from_fitting(weight: Tensor):
    """A negative zero keeps its sign where the non-zeros of its group leave a slot, and no other bit moves."""
    cleared, count = clear_negative_zeros(weight)
    with without_kernels():
        defined, defined_count = clear_negative_zeros(weight)
    assert count == defined_count
    assert torch.equal(bits_of(cleared), bits_of(defined))
    before, after = (bits_of(each).view(-1, 4) for each in (weight, cleared))
    assert int((before != after).sum()) == count
    if weight.dtype.is_floating_point:
        lowest = torch.iinfo(before.dtype).min
        assert bool((before[before != after] == lowest).all())
        nonzeros = ((before != 0) & (before != lowest)).sum(-1)
        negative = (before == lowest).sum(-1)
        kept = (after == lowest).sum(-1)
        assert torch.equal(kept, torch.minimum(negative, (2 - nonzeros).clamp(min=0)))


@examples(25)
@given(weights_of_any_width(), st.integers(0, 40))
def test_rows_that_are_cleared_as_they_are_packed(weight: Tensor, first: int):
    cleared, count = clear_negative_zeros(weight)
    values = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=weight.dtype)
    positions = torch.empty(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)

    def pack(rows: Tensor) -> Packed24:
        assert pack_rows(rows, values, positions, first, clear=True) == count
        return Packed24(values, positions)

    expected = outcome(pack_2_4, cleared)
    if isinstance(expected, str):
        row = int(expected.split()[1].rstrip(","))
        expected = expected.replace(f"row {row},", f"row {first + row},")
    assert outcome(pack, weight) == expected
    with without_kernels():
        assert outcome(pack, weight) == expected


@examples(15)
@given(weights_of_any_width(groups_of=2))
def test_unpack_is_the_inverse_of_pack_for_pairs(weight: Tensor):
    weight, _ = clear_negative_zeros(weight, 2)
    pairs = weight.view(-1, 2)
    weight = torch.where(
        (pairs.view(torch.int32) != 0).all(-1, keepdim=True), pairs[:, :1].new_zeros(1), pairs
    )
    weight = weight.view(-1, 4)
    packed = pack_1_2(weight)
    assert torch.equal(bits_of(unpack_1_2(packed, 4)), bits_of(weight))
    with without_kernels():
        assert torch.equal(bits_of(unpack_1_2(packed, 4)), bits_of(weight))


def test_pairs_are_refused_with_the_reason():
    with pytest.raises(UsageError, match="it is the form of float32"):
        pack_1_2(torch.zeros(1, 4, dtype=torch.float16))
    weight = torch.zeros(3, 8)
    weight[1, 2:4] = 1
    with pytest.raises(PatternError, match="row 1, columns 2-3 hold 2 non-zeros, 1:2 allows 1"):
        pack_1_2(weight)
    packed = pack_1_2(torch.zeros(3, 8))
    packed.positions[2, 1] = 0x8E
    with pytest.raises(
        FormatError, match="row 2, columns 6-7 have the position nibble 0x8, which is not 0x4 or 0xE"
    ):
        unpack_1_2(packed, 8)


def test_faults_are_named_with_and_without_compiled_loops():
    packed = pack_2_4(random_2_4(40, 24, torch.float16))
    packed.positions[33, 2] = 0x44 - 0x4
    for context in (nullcontext, without_kernels):
        with (
            context(),
            pytest.raises(FormatError, match="row 35, columns 16-19 have the position nibble 0x0"),
        ):
            unpack_2_4(packed, 24, first_row=2)


def drawn(seed: int, count: int, width: int, density: float) -> np.ndarray:
    """Random elements with zeros, zeros of negative sign, subnormals and the largest number among them."""
    generator = np.random.default_rng(seed)
    sign = 1 << (8 * width - 1)
    special = np.array([sign, 1, sign | 1, 2 * sign - 1, 7], dtype=f"<u{width}")
    elements = special[generator.integers(0, special.size, count)]
    elements[generator.random(count) >= density] = 0
    return elements


@pytest.mark.parametrize("context", [nullcontext, without_kernels])
@examples(25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 300),
    width=st.sampled_from([1, 2, 4, 8]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_compress_keeps_what_has_a_bit_and_expand_puts_it_back(context, seed, count, width, density):
    elements = drawn(seed, count, width, density)
    bits = np.full(-(-count // 8), 0xAA, dtype=np.uint8)
    with context():
        values = compress(elements, bits)
    kept = [element for element in elements.tolist() if element != 0]
    assert values.tolist() == kept
    assert bits.tolist() == np.packbits(elements != 0, bitorder="little").tolist()
    assert popcount(bits) == len(kept)
    again = np.full_like(elements, 0x55)
    with context():
        expand(bits, values.copy(), again)
    assert again.tolist() == elements.tolist()


def test_loops_are_compiled_where_numba_is_installed():
    assert packing.kernels(torch.zeros(1)) is not None
