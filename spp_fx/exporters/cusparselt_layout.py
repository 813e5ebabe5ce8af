"""The packed tensors cuSPARSELt's sparse GEMM takes for 2:4 weights of 16-bit types, built on the CPU.

A packed tensor is flat `[values | meta]`: the kept entries row-major, m k/2 of them, then m k/8 bytes of
metadata, one nibble a group of four columns (the nibbles of `semi_structured`), in an order that depends
on the GPU. PyTorch holds it as (m, 9k/16) of the weight's dtype.

NVIDIA does not document that order and may change it. What is here follows public kernels that write it:

- sm80: PyTorch, aten/src/ATen/native/sparse/cuda/SparseSemiStructuredTile.cu, `MetadataCuSparseLt`. Inside
  a 32 x 32 tile it is CUTLASS' 16-bit order, which PyTorch also has in Python.
- sm90: torchao, torchao/csrc/cuda/activation24 (sparsify24.cu, `MetadataCusparseLt16bits`, and
  warp_tensor.h, `store_metadata_reordered`). No public test compares it with the library.

So a pack is a proposal: whoever loads it compares it once with the library on the GPU it is for, and
repacks from the layout-neutral form where they differ. `cusparselt_reader` decodes a pack, by a table of
its own.
"""

from typing import Final, Literal

import torch
from torch import Tensor

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.semi_structured import Packed24, pack_2_4

Sm = Literal[80, 90]

#: Rows and columns must be multiples of this for the order to be the known one.
BLOCK: Final[dict[int, int]] = {80: 128, 90: 64}

#: Metadata bytes reordered at a time for sm90.
_CHUNK_BYTES = 1 << 22


def refusal(shape: tuple[int, ...], dtype: torch.dtype, sm: int) -> str | None:
    """Why a weight cannot be packed for a GPU ahead of time, or None where it can.

    Args:
        shape: of the dense weight, (out features, in features).
        dtype: of the weight.
        sm: compute capability of the GPU, 80 or 90.
    """
    name = str(dtype).removeprefix("torch.")
    if sm not in BLOCK:
        known = " and ".join(f"sm{known}" for known in BLOCK)
        return f"the metadata order of sm{sm} is not public ({known} are known): repack at load"
    if dtype == torch.float32:
        return "float32 is 1:2 sparse on tensor cores and refused by PyTorch's cuSPARSELt class: use bfloat16"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the metadata order of {name} is not public (float16 and bfloat16 are known): repack at load"
    if len(shape) != 2:
        return f"shape {tuple(shape)} is not a matrix"
    block = BLOCK[sm]
    if any(size == 0 or size % block for size in shape):
        return (
            f"shape {shape[0]} x {shape[1]}: the metadata order of sm{sm} is known for rows and columns "
            f"in multiples of {block}: repack at load"
        )
    return None


def pack(weight: Tensor, sm: Sm) -> Tensor:
    """Pack a dense 2:4 weight.

    Args:
        weight: (m, k) float16 or bfloat16, already 2:4; m and k multiples of 128 (sm80) or 64 (sm90).
        sm: the GPU the pack is for.

    Returns:
        (m, 9k/16) of weight's dtype: values, then metadata.

    Raises:
        UsageError: `refusal` has a reason.
        PatternError: weight is not 2:4, see `pack_2_4`.
    """
    _check(tuple(weight.shape), weight.dtype, sm)
    return from_neutral(pack_2_4(weight), sm)


def from_neutral(neutral: Packed24, sm: Sm) -> Tensor:
    """Pack the layout-neutral form of a weight, without making it dense.

    Args:
        neutral: of a float16 or bfloat16 weight (m, k), see `pack`.
        sm: the GPU the pack is for.

    Returns:
        (m, 9k/16) of the values' dtype.

    Raises:
        UsageError: `refusal` has a reason.
        FormatError: the positions do not fit the values.
    """
    m, k = neutral.shape
    dtype = neutral.values.dtype
    _check((m, k), dtype, sm)
    if neutral.positions.dtype != torch.uint8 or neutral.positions.shape != (m, k // 8):
        raise FormatError(
            f"positions are {neutral.positions.dtype} of shape {tuple(neutral.positions.shape)}, "
            f"a weight of {m} x {k} needs torch.uint8 of shape ({m}, {k // 8})"
        )
    positions = neutral.positions.contiguous()
    # Integers throughout: no float conversion can touch a NaN's payload.
    packed = torch.empty(m * 9 * k // 16, dtype=torch.int16, device=neutral.values.device)
    values, meta = packed[: m * k // 2], packed[m * k // 2 :].view(torch.uint8)
    values.view(m, k // 2).copy_(neutral.values.view(torch.int16))
    if sm == 80:
        _sm80_order(meta, m, k).copy_(_sm80_rows(positions, m, k))
    else:
        _fill_sm90(positions, meta, m, k)
    return packed.view(dtype).view(m, 9 * k // 16)


def _check(shape: tuple[int, ...], dtype: torch.dtype, sm: int) -> None:
    if reason := refusal(shape, dtype, sm):
        raise UsageError(f"cannot pack for cuSPARSELt: {reason}")


def _sm80_order(meta: Tensor, m: int, k: int) -> Tensor:
    """Metadata (m k/8,) uint8 as a view [C, R, c32, r32, r, r16, c16, r8, byte], the order in memory.

    A unit is two bytes, the 16 columns of one row. Unit (row, column) of the (m, k/16) units has
    row = 128 R + 32 r32 + 16 r16 + 8 r8 + r and column = 4 C + 2 c32 + c16: 128 x 64 panels, panels of
    a column below one another, in a panel 32 x 32 tiles of 64 units, column by column; in a tile, for each r,
    (r, 0) (r+8, 0) (r, 1) (r+8, 1) (r+16, 0) (r+24, 0) (r+16, 1) (r+24, 1).
    """
    return meta.view(k // 64, m // 128, 2, 4, 8, 2, 2, 2, 2)


def _sm80_rows(positions: Tensor, m: int, k: int) -> Tensor:
    """Positions (m, k/8) uint8, row-major, as a view with the axes of `_sm80_order`."""
    units = positions.view(m // 128, 4, 2, 2, 8, k // 64, 2, 2, 2)  # R r32 r16 r8 r C c32 c16 byte
    return units.permute(5, 0, 6, 1, 4, 2, 7, 3, 8)


def _fill_sm90(positions: Tensor, meta: Tensor, m: int, k: int) -> None:
    """Fill sm90's metadata (m k/8,) uint8 from positions (m, k/8) uint8.

    64 rows are 8 k bytes of metadata, in which 64 x 32 blocks of 256 bytes follow one another along the
    columns; in a block 16 rows are 64 bytes; there, row r (0..7) is 8 bytes, one for each group of four
    columns in the order 0 4 1 5 2 6 3 7, with row r in the low nibble and row r + 8 in the high one.

    A byte of positions holds two groups of one row, a byte of metadata one group of two rows: the bytes of
    rows r and r + 8 become the bytes of the even and the odd group by swapping two nibbles. Group
    4 d + 2 h + odd (its byte is 2 d + h) stands at 4 h + 2 odd + d.
    """
    rows = positions.view(m // 64, 4, 2, 8, k // 32, 2, 2)  # R r16 r8 r C d h
    upper, lower = rows[:, :, 0], rows[:, :, 1]  # R r16 r C d h
    groups = meta.view(m // 64, k // 32, 4, 8, 2, 2, 2)  # R C r16 r h odd d
    even, odd = (groups[..., i, :].permute(0, 2, 3, 1, 5, 4) for i in (0, 1))  # R r16 r C d h
    step = max(1, _CHUNK_BYTES // (8 * k))
    for start in range(0, m // 64, step):
        part = slice(start, start + step)
        first, second = upper[part], lower[part]
        even[part] = (first & 0x0F) | (second << 4)
        odd[part] = (first >> 4) | (second & 0xF0)
