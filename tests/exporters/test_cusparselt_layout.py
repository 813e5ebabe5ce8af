"""cuSPARSELt's packed tensors: metadata in the order of the written formulas, and bit for bit back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as cutlass_pack,
)

from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.exporters import cusparselt_layout
from spp_fx.exporters.cusparselt_layout import Sm, fill, neutral_form, pack, refusal, unpack
from spp_fx.sparsity.packing import pack_2_4
from tests.effort import examples
from tests.exporters.packing import without_kernels

SHAPES: list[tuple[Sm, int, int]] = [
    (80, 128, 128),
    (80, 256, 128),
    (80, 128, 384),
    (80, 384, 256),
    (90, 64, 64),
    (90, 128, 64),
    (90, 64, 192),
    (90, 192, 320),
    (90, 128, 128),
]


def nibble_offset(row: int, group: int, m: int, k: int, sm: Sm) -> int:
    """Where the nibble of a group of four columns stands in the metadata, in nibbles: the plain formulas."""
    column = 4 * group
    if sm == 80:
        order = [(r, c) for r in range(8) for r, c in sm80_line(r)]
        tile_row, tile_column = row // 32 * 32, column // 32 * 32
        tile = (
            tile_row // 128 * 512
            + tile_column // 64 * 512 * (m // 128)
            + tile_row % 128 // 32 * 64
            + tile_column % 64 // 32 * 256
        )
        unit = tile + order.index((row - tile_row, (column - tile_column) // 16))
        return 4 * unit + group % 4
    block = column // 32 * 256 + row % 64 // 16 * 64 + row // 64 * 8 * k
    byte = block + 8 * (row % 8) + [0, 4, 1, 5, 2, 6, 3, 7].index(group % 8)
    return 2 * byte + (row % 16 >= 8)


def sm80_line(r: int) -> list[tuple[int, int]]:
    """The eight units (row, 16-column half) that stand together in a 32 x 32 tile."""
    return [(r, 0), (r + 8, 0), (r, 1), (r + 8, 1), (r + 16, 0), (r + 24, 0), (r + 16, 1), (r + 24, 1)]


def nibbles_of(meta: Tensor) -> Tensor:
    """Bytes as nibbles, the low one first."""
    return torch.stack((meta & 0xF, meta >> 4), -1).flatten().to(torch.int64)


def metadata(packed: Tensor, m: int, k: int) -> Tensor:
    return packed.reshape(-1)[m * k // 2 :].view(torch.uint8)


def random_2_4(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(m, k) of random bits (NaNs, infinities, subnormals, -0.0 among them) in zero to two places a group."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 15), 1 << 15, (m, k), generator=generator, dtype=torch.int16)
    special = torch.tensor([-(1 << 15), 1, 0x7C00, 0x7C01, 0x7F80, 0x7F81, -1, 0], dtype=torch.int16)
    choice = torch.randint(0, 16, (m, k), generator=generator)
    bits = torch.where(choice < 8, special[choice % 8], bits)
    order = torch.rand(m, k // 4, 4, generator=generator).argsort(-1)
    kept = torch.randint(0, 3, (m, k // 4, 1), generator=generator)
    return torch.where((order < kept).view(m, k), bits, 0).to(torch.int16).view(dtype)


def written_order(m: int, k: int, sm: Sm) -> Tensor:
    """Which group (row-major number) each nibble of the metadata holds, as the code under test writes it.

    The groups' numbers go through it a hexadecimal digit at a time, in place of position nibbles.
    """
    groups = torch.arange(m * k // 4)
    written = torch.empty(m * k // 8, dtype=torch.uint8)
    found = torch.zeros_like(groups)
    for shift in range(0, 20, 4):
        digit = (groups >> shift & 0xF).to(torch.uint8).view(m, k // 4)
        fill(digit[:, 0::2] | digit[:, 1::2] << 4, written, 0, (m, k), sm)
        found |= nibbles_of(written) << shift
    return found


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
def test_metadata_order_is_the_formula_and_fills_the_buffer(sm: Sm, m: int, k: int):
    order = written_order(m, k, sm)
    assert torch.equal(order.sort().values, torch.arange(m * k // 4)), "each group once, nothing left over"
    offsets = [nibble_offset(row, group, m, k, sm) for row in range(m) for group in range(k // 4)]
    assert torch.equal(order[torch.tensor(offsets)], torch.arange(m * k // 4))


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
@examples(8)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_unpack_is_the_inverse_of_pack_bit_for_bit(sm: Sm, m: int, k: int, seed: int, dtype: torch.dtype):
    weight = random_2_4(m, k, dtype, seed)
    packed = pack(weight, sm)
    assert packed.shape == (m, 9 * k // 16)
    assert packed.dtype == dtype
    assert torch.equal(unpack(packed, (m, k), sm).view(torch.int16), weight.view(torch.int16))
    assert torch.equal(unpack(packed.flatten(), (m, k), sm).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("sm", [80, 90])
def test_values_come_first_row_major(sm: Sm):
    weight = random_2_4(128, 256, torch.bfloat16, 3)
    neutral = pack_2_4(weight)
    packed = pack(weight, sm)
    values = packed.view(torch.int16).flatten()[: 128 * 128]
    assert torch.equal(values, neutral.values.view(torch.int16).flatten())


def test_sm80_example_worked_by_hand():
    weight = torch.zeros(128, 128, dtype=torch.float16)
    weight[9, 16], weight[9, 17] = 1, 2  # row 1 + 8, second half: unit 1 * 8 + 3, first nibble 0 | 1 << 2
    weight[100, 100], weight[100, 102] = (
        3,
        4,
    )  # tile (96, 96): 512 + 3 * 64 + 256, unit 4 * 8, second nibble 8
    packed = pack(weight, 80)
    units = packed.view(torch.int16).flatten()[128 * 64 :].to(torch.int32) & 0xFFFF
    expected = torch.full((1024,), 0xEEEE, dtype=torch.int32)
    expected[11] = 0xEEE4
    expected[960 + 32] = 0xEE8E
    assert torch.equal(units, expected)
    values = packed.flatten()[: 128 * 64].view(128, 64)
    assert values[9, 8:10].tolist() == [1, 2]
    assert values[100, 50:52].tolist() == [3, 4]
    assert int(values.count_nonzero()) == 4


def test_sm90_example_worked_by_hand():
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[3, 20], weight[3, 21] = 1, 2  # group 5, fourth in line: byte 3 * 8 + 3, low nibble 0 | 1 << 2
    weight[11, 21], weight[11, 22] = 3, 4  # eight rows below: the same byte, high nibble 1 | 2 << 2
    weight[40, 36], weight[40, 39] = 5, 6  # second block, rows 32-47: 256 + 128 + 2, high nibble 0 | 3 << 2
    meta = metadata(pack(weight, 90), 64, 64)
    expected = torch.full((512,), 0xEE, dtype=torch.uint8)
    expected[27] = 0x94
    expected[386] = 0xCE
    assert torch.equal(meta, expected)


def test_a_32_by_32_tile_of_sm80_is_torchs_cutlass_order():
    m, k = 256, 128
    weight = torch.where(random_2_4(m, k, torch.float16, 5) != 0, 1.0, 0.0).to(torch.float16)
    units = metadata(pack(weight, 80), m, k).view(torch.int16)
    for row in range(0, m, 32):
        for column in range(0, k, 32):
            start = nibble_offset(row, column // 4, m, k, 80) // 4
            _, meta = cutlass_pack(weight[row : row + 32, column : column + 32].contiguous())
            assert torch.equal(units[start : start + 64], meta.flatten()), (row, column)


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
def test_bands_of_rows_filled_one_by_one_give_the_same(sm: Sm, m: int, k: int):
    weight = random_2_4(m, k, torch.float16, 7)
    neutral, whole = pack_2_4(weight), metadata(pack(weight, sm), m, k)
    meta, step = torch.zeros_like(whole), cusparselt_layout.BLOCK[sm]
    for start in reversed(range(0, m, step)):
        cusparselt_layout.fill(neutral.positions[start : start + step], meta, start, (m, k), sm)
    assert torch.equal(meta, whole)


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
@examples(5)
@given(seed=st.integers(0, 2**32))
def test_compiled_loops_order_as_torch_does(sm: Sm, m: int, k: int, seed: int):
    weight = random_2_4(m, k, torch.bfloat16, seed)
    compiled = pack(weight, sm)
    with without_kernels():
        defined = pack(weight, sm)
        assert torch.equal(unpack(compiled, (m, k), sm).view(torch.int16), weight.view(torch.int16))
    assert torch.equal(compiled.view(torch.int16), defined.view(torch.int16))


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
def test_the_neutral_form_of_a_pack_is_the_one_it_was_made_from(sm: Sm, m: int, k: int):
    weight = random_2_4(m, k, torch.bfloat16, 11)
    neutral, found = pack_2_4(weight), neutral_form(pack(weight, sm), (m, k), sm)
    assert torch.equal(found.values.view(torch.int16), neutral.values.view(torch.int16))
    assert torch.equal(found.positions, neutral.positions)


@pytest.mark.parametrize(
    ("shape", "dtype", "sm", "reason"),
    [
        ((128, 128), torch.float32, 80, "1:2"),
        ((128, 128), torch.int8, 80, "metadata order of int8 is not public"),
        ((128, 128), torch.float8_e4m3fn, 90, "metadata order of float8_e4m3fn is not public"),
        ((128, 128), torch.uint8, 80, "uint8 is not taken by PyTorch's cuSPARSELt class"),
        ((128, 128), torch.float64, 80, "float64 is not taken"),
        ((128, 128), torch.float16, 100, "sm100 is not public .sm80 and sm90 are known.: packed at load"),
        ((128, 72), torch.float16, 100, "multiples of 16 .dense at load."),
        ((48, 64), torch.int8, 80, "multiples of 32 .dense at load."),
        ((64, 128), torch.float16, 80, "shape 64 x 128: .* multiples of 128"),
        ((128, 192), torch.bfloat16, 80, "shape 128 x 192: .* multiples of 128"),
        ((96, 64), torch.bfloat16, 90, "multiples of 64"),
        ((64, 80), torch.bfloat16, 90, "multiples of 64: packed at load"),
        ((0, 128), torch.float16, 90, "multiples of 16"),
        ((2, 128, 128), torch.float16, 80, "not a matrix"),
    ],
)
def test_refusals_carry_their_reason(shape: tuple[int, ...], dtype: torch.dtype, sm: Sm, reason: str):
    with pytest.raises(UsageError, match=reason):
        pack(torch.zeros(shape, dtype=dtype), sm)
    given_reason = refusal(shape, dtype, sm)
    assert given_reason is not None
    assert not given_reason.endswith(".")


@pytest.mark.parametrize(("sm", "m", "k"), SHAPES)
def test_what_the_formulas_cover_is_not_refused(sm: Sm, m: int, k: int):
    assert refusal((m, k), torch.float16, sm) is None
    assert refusal((m, k), torch.bfloat16, sm) is None


def test_a_weight_that_is_not_2_4_is_named():
    weight = torch.zeros(128, 128, dtype=torch.bfloat16)
    weight[17, 64:67] = 1
    with pytest.raises(PatternError, match="row 17, columns 64-67 hold 3 non-zeros"):
        pack(weight, 80)


@pytest.mark.parametrize("sm", [80, 90])
def test_a_packed_tensor_that_does_not_fit_is_refused(sm: Sm):
    packed = pack(torch.zeros(128, 128, dtype=torch.float16), sm)
    with pytest.raises(FormatError, match=r"a weight of 128 x 256 needs \(128, 144\)"):
        unpack(packed, (128, 256), sm)
    broken = packed.clone()
    broken.view(torch.int16)[127, 71] = 0
    with pytest.raises(FormatError, match="position nibble 0x0"):
        unpack(broken, (128, 128), sm)
