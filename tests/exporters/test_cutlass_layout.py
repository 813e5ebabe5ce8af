"""PyTorch's CUTLASS form: the bytes of torch's converter, and bit for bit back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as torch_pack,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as torch_unpack,
)

from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.exporters import cutlass_layout
from spp_fx.exporters.cutlass_layout import FORMS, neutral_form, pack, refusal, unpack
from spp_fx.sparsity.packing import clear_negative_zeros, pack_1_2, pack_2_4
from tests.effort import examples
from tests.exporters.packing import bits_of, random_sparse, without_kernels

DTYPES = list(FORMS)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A weight of any dtype and of a shape that is taken; numbers of both signs, no negative zero."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = FORMS[dtype].multiples
    m, k = rows * draw(st.integers(1, 5)), columns * draw(st.integers(1, 4))
    return random_sparse(m, k, dtype, draw(st.integers(0, 2**32)), FORMS[dtype].group)


@examples(15)
@given(weights())
def test_the_bytes_are_those_of_torchs_converter(weight: Tensor):
    packed, meta = pack(weight)
    theirs, their_meta = torch_pack(weight)
    assert torch.equal(bits_of(packed), bits_of(theirs))
    assert meta.dtype == their_meta.dtype
    assert torch.equal(meta, their_meta)


@examples(15)
@given(weights())
def test_compiled_loops_pack_as_torch_does(weight: Tensor):
    packed, meta = pack(weight)
    with without_kernels():
        defined, defined_meta = pack(weight)
        assert torch.equal(bits_of(unpack(packed, meta)), bits_of(weight))
    assert torch.equal(bits_of(packed), bits_of(defined))
    assert torch.equal(meta, defined_meta)


@examples(20)
@given(weights(), st.integers(0, 2**32))
def test_unpack_is_the_inverse_of_pack_bit_for_bit(weight: Tensor, seed: int):
    """Of any bits: NaNs with their payloads, infinities, and negative zeros that have a slot."""
    group = FORMS[weight.dtype].group
    generator = torch.Generator().manual_seed(seed)
    integers = bits_of(weight)
    info = torch.iinfo(integers.dtype)
    noise = torch.randint(info.min, info.max, integers.shape, generator=generator, dtype=integers.dtype)
    special = torch.randint(0, 3, integers.shape, generator=generator)
    entries = torch.where(special == 0, torch.full_like(integers, info.min), noise)
    weight = torch.where(integers != 0, entries, integers).view(weight.dtype)
    weight, cleared = clear_negative_zeros(weight, group)
    assert cleared == 0
    assert torch.equal(bits_of(unpack(*pack(weight))), bits_of(weight))


def test_torchs_own_decoder_reads_it():
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        rows, columns = FORMS[dtype].multiples
        weight = random_sparse(2 * rows, 2 * columns, dtype, 3)
        assert torch.equal(torch_unpack(*pack(weight)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_are_those_of_torchs_class(dtype: torch.dtype):
    rows, columns = FORMS[dtype].multiples
    theirs = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
    assert (theirs.sparse_min_rows, theirs.sparse_min_cols) == (rows, columns)
    assert set(SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS) == set(FORMS)
    assert refusal((rows, columns), dtype) is None
    for shape in [(rows // 2, columns), (rows, columns // 2), (0, columns), (rows + 8, columns)]:
        assert f"multiples of {columns}" in (refusal(shape, dtype) or "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bands_of_rows_filled_one_by_one_give_the_same(dtype: torch.dtype):
    form = FORMS[dtype]
    weight = random_sparse(3 * form.multiples[0], 2 * form.multiples[1], dtype, 5, form.group)
    neutral = pack_2_4(weight) if form.group == 4 else pack_1_2(weight)
    _, whole = pack(weight)
    meta = torch.zeros_like(whole)
    for start in reversed(range(0, len(weight), form.rows)):
        cutlass_layout.fill(neutral.positions[start : start + form.rows], meta, start)
    assert torch.equal(meta, whole)
    found = neutral_form(neutral.values, whole)
    assert torch.equal(found.positions, neutral.positions)


def test_an_example_worked_by_hand():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[9, 17], weight[9, 19] = 1, 2  # row 1 + 8, second unit, first group: 1 | 3 << 2
    _, meta = pack(weight)
    expected = torch.full((128,), 0xEEEE, dtype=torch.int32)
    expected[8 * 1 + 3] = 0xEEED  # r = 1: (1, 0) (9, 0) (1, 1) (9, 1)
    assert torch.equal(meta.flatten().to(torch.int32) & 0xFFFF, expected)


def test_signalling_nans_of_float32_survive():
    """torch's decoder changes them on a CPU, where half precision numbers carry the halves."""
    weight = torch.zeros(32, 32, dtype=torch.int32)
    weight[:, ::2] = 0x7F800001
    packed = pack(weight.view(torch.float32))
    assert torch.equal(bits_of(unpack(*packed)), weight)


def test_a_weight_without_the_pattern_is_named_not_pruned():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[17, 8:11] = 1
    with pytest.raises(PatternError, match="row 17, columns 8-11 hold 3 non-zeros, 2:4 allows 2"):
        pack(weight)
    with pytest.raises(PatternError, match="row 17, columns 8-9 hold 2 non-zeros, 1:2 allows 1"):
        pack(weight.float())


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((32, 64), torch.float64, "do not take float64, but float16, bfloat16, int8, float32"),
        ((32, 64), torch.float8_e4m3fn, "do not take float8_e4m3fn"),
        ((2, 32, 64), torch.float16, "not a matrix"),
        ((32, 96), torch.float16, "float16 of rows in multiples of 32 and columns in multiples of 64"),
    ],
)
def test_refusals_carry_their_reason(shape: tuple[int, ...], dtype: torch.dtype, reason: str):
    with pytest.raises(UsageError, match=reason):
        pack(torch.zeros(shape, dtype=dtype))


def test_tensors_that_do_not_fit_are_refused():
    packed, meta = pack(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(FormatError, match=r"a weight of 32 x 64 needs torch\.int16 of shape \(32, 4\)"):
        unpack(packed, meta[:, :2])
    with pytest.raises(FormatError, match=r"metadata is torch\.int32"):
        unpack(packed, meta.int())
    with pytest.raises(UsageError, match="multiples of"):
        unpack(packed[:16], meta)
    meta[31, 3] = 0
    with pytest.raises(FormatError, match="row 31, columns 48-51 have the position nibble 0x0"):
        unpack(packed, meta)
