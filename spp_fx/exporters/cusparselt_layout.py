"""The packed tensor that cuSPARSELt's sparse GEMM takes for a 2:4 weight of a 16-bit type.

A packed tensor is flat: the kept entries row-major, m k/2 of them, then m k/8 bytes of metadata with a nibble for each
group of four columns (those of `sparsity.packing`), in an order that depends on the GPU. PyTorch holds it as
(m, 9k/16) of the weight's dtype. NVIDIA does not document the order and may change it. What is here follows public
kernels that write it:

- sm80: PyTorch, aten/src/ATen/native/sparse/cuda/SparseSemiStructuredTile.cu, `MetadataCuSparseLt`. Inside
  a 32 x 32 tile it is CUTLASS' 16-bit order, which PyTorch also has in Python.
- sm90: torchao, torchao/csrc/cuda/activation24 (sparsify24.cu, `MetadataCusparseLt16bits`, and
  warp_tensor.h, `store_metadata_reordered`). On an H100 it gave the bytes of cuSPARSELt 0.8.0 for all layers
  of Llama 1B, 7B and 70B in bfloat16 (benchmarks/results/gpu_runtime.json).

So a pack is untrusted until checked: `spp_fx.runtime` compares its products with the dense ones on the GPU, and packs
again where they differ. Writing permutes axes; reading goes by a table of offsets and uses no code of the writer.
"""

from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.cutlass_layout import Indices, fill_tiles, gather
from spp_fx.sparsity.packing import Packed24, kernels, pack_2_4, unpack_2_4

Sm = Literal[80, 90]

#: Rows and columns must be multiples of this for the order to be the known one.
BLOCK: Final[dict[int, int]] = {80: 128, 90: 64}

#: Rows and columns that PyTorch's class takes are multiples of this.
_CLASS_MULTIPLE: Final[dict[torch.dtype, int]] = {
    torch.float16: 16,
    torch.bfloat16: 16,
    torch.int8: 32,
    torch.float8_e4m3fn: 32,
}


def refusal(shape: tuple[int, ...], dtype: torch.dtype, sm: int) -> str | None:
    """Why a weight (out, in) of a dtype cannot be packed for a GPU ahead of time, or None where it can."""
    name = str(dtype).removeprefix("torch.")
    if len(shape) != 2:
        return f"shape {tuple(shape)} is not a matrix"
    if dtype == torch.float32:
        return "float32 is 1:2 sparse on tensor cores and not taken by PyTorch's cuSPARSELt class (dense at load)"
    multiple = _CLASS_MULTIPLE.get(dtype)
    if multiple is None:
        return f"{name} is not taken by PyTorch's cuSPARSELt class (dense at load)"
    rows_columns = f"shape {shape[0]} x {shape[1]}"
    if any(size == 0 or size % multiple for size in shape):
        return f"{rows_columns}: PyTorch's cuSPARSELt class takes multiples of {multiple} (dense at load)"
    if sm not in BLOCK:
        known = " and ".join(f"sm{known}" for known in BLOCK)
        return f"the metadata order of sm{sm} is not public ({known} are known): packed at load"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the metadata order of {name} is not public (float16 and bfloat16 are known): packed at load"
    block = BLOCK[sm]
    if any(size % block for size in shape):
        return (
            f"{rows_columns}: the metadata order of sm{sm} is known for rows and columns in multiples of "
            f"{block}: packed at load"
        )
    return None


def _check(shape: tuple[int, ...], dtype: torch.dtype, sm: int) -> None:
    if reason := refusal(shape, dtype, sm):
        raise UsageError(f"not a cuSPARSELt pack: {reason}")


# Writing


def pack(weight: Tensor, sm: Sm) -> Tensor:
    """Pack a dense 2:4 weight.

    Args:
        weight: (m, k) float16 or bfloat16, already 2:4; m and k multiples of 128 (sm80) or 64 (sm90).

    Returns:
        (m, 9k/16) of weight's dtype: values, then metadata.

    Raises:
        UsageError: `refusal` has a reason.
        PatternError: weight is not 2:4, see `pack_2_4`.
    """
    _check(tuple(weight.shape), weight.dtype, sm)
    (m, k), neutral = weight.shape, pack_2_4(weight)
    metadata = torch.empty(m * k // 8, dtype=torch.uint8, device=weight.device)
    fill(neutral.positions, metadata, 0, (m, k), sm)
    # As integers: a NaN keeps its payload.
    packed = torch.cat((neutral.values.view(torch.int16).reshape(-1), metadata.view(torch.int16)))
    return packed.view(weight.dtype).view(m, 9 * k // 16)


def fill(positions: Tensor, meta: Tensor, first_row: int, shape: tuple[int, int], sm: Sm) -> None:
    """Write the positions of some rows into the metadata of a pack.

    Args:
        positions: (r, k/8) uint8, contiguous; r a multiple of `BLOCK[sm]`.
        meta: (m k/8,) uint8.
        first_row: number of the first of these rows in the weight, a multiple as r.
        shape: (m, k) of the weight.
    """
    m, k = shape
    blocks = slice(first_row // BLOCK[sm], (first_row + len(positions)) // BLOCK[sm])
    if sm == 80:
        # 128 x 64 panels, panels of a column below one another; in a panel 2 columns of 4 tiles.
        tiles = meta.view(torch.int16).view(k // 64, m // 128, 2, 4, 8, 8)
        fill_tiles(positions.view(torch.int16), tiles[:, blocks])
    else:
        fill_sm90(positions, meta.view(m // 64, k // 32, 4, 8, 8)[blocks])


def fill_sm90(positions: Tensor, meta: Tensor) -> None:
    """Fill sm90's metadata from positions.

    64 rows are 8 k bytes of metadata, in which 64 x 32 blocks of 256 bytes follow one another along the
    columns; in a block 16 rows are 64 bytes; there, row r (0..7) is 8 bytes, one for each group of four
    columns in the order 0 4 1 5 2 6 3 7, with row r in the low nibble and row r + 8 in the high one.

    A byte of positions holds two groups of one row, a byte of metadata one group of two rows: the bytes of
    rows r and r + 8 become the bytes of the even and the odd group by swapping two nibbles. Group
    4 d + 2 h + odd (its byte is 2 d + h) is at 4 h + 2 odd + d.

    Args:
        positions: (64 R, 4 C) uint8, contiguous.
        meta: [R, C, 4, 8, 8] uint8, a view of the metadata: row and column of blocks, sixteen rows, r, byte.
    """
    if compiled := kernels(meta):
        compiled.fill_sm90(positions.numpy(), meta.numpy())
        return
    blocks, columns = meta.shape[:2]
    rows = positions.view(blocks, 4, 2, 8, columns, 2, 2)  # R r16 r8 r C d h
    upper, lower = rows[:, :, 0], rows[:, :, 1]  # R r16 r C d h
    groups = meta.view(blocks, columns, 4, 8, 2, 2, 2)  # R C r16 r h odd d
    even, odd = (groups[..., i, :].permute(0, 2, 3, 1, 5, 4) for i in (0, 1))  # R r16 r C d h
    even.copy_((upper & 0x0F) | (lower << 4))
    odd.copy_((upper >> 4) | (lower & 0xF0))


# Reading

# sm80: in a 32 x 32 tile of 64 units (a unit is 16 columns of one row, four nibbles) the eight units of
# r are (r, 0) (r+8, 0) (r, 1) (r+8, 1) (r+16, 0) (r+24, 0) (r+16, 1) (r+24, 1).
_UNIT_OF_ROW = np.array([8 * (row % 8) + {0: 0, 8: 1, 16: 4, 24: 5}[row // 8 * 8] for row in range(32)])
_UNIT_OF_HALF = np.array([0, 2])

# sm90: which of the 8 bytes of a row holds each of the eight groups of 32 columns.
_BYTE_OF_GROUP = np.array([[0, 4, 1, 5, 2, 6, 3, 7].index(group) for group in range(8)])


def nibble_indices(m: int, k: int, sm: Sm) -> tuple[Indices, Indices]:
    """Where nibbles are in the metadata of an (m, k) pack: that of group j of row i at rows[i] + groups[j].

    Returns:
        rows (m,) and groups (k/4,), in nibbles.
    """
    row, group = np.arange(m), np.arange(k // 4)
    column = 4 * group
    if sm == 80:
        below = row // 128 * 512 + row % 128 // 32 * 64 + _UNIT_OF_ROW[row % 32]
        beside = column // 64 * 512 * (m // 128) + column % 64 // 32 * 256 + _UNIT_OF_HALF[column % 32 // 16]
        return 4 * below, 4 * beside + group % 4
    below = row // 64 * 8 * k + row % 64 // 16 * 64 + 8 * (row % 8)
    return 2 * below + row % 16 // 8, 2 * (column // 32 * 256 + _BYTE_OF_GROUP[group % 8])


def neutral_form(packed: Tensor, shape: tuple[int, int], sm: Sm) -> Packed24:
    """The layout-neutral form of a packed tensor, from which it can be packed for any other GPU.

    Args:
        packed: (m, 9k/16), or flat as older PyTorch has it, float16 or bfloat16.
        shape: (m, k) of the dense weight.

    Returns:
        values, a view of packed where that is on the CPU, and positions.

    Raises:
        UsageError: the order is not known for this shape, dtype or GPU.
        FormatError: the size does not fit the shape.
    """
    m, k = shape
    _check(shape, packed.dtype, sm)
    if packed.dim() not in (1, 2) or packed.numel() != m * 9 * k // 16:
        raise FormatError(
            f"packed tensor has shape {tuple(packed.shape)}, a weight of {m} x {k} needs ({m}, {9 * k // 16})"
        )
    flat = packed.detach().cpu().reshape(-1)
    return Packed24(flat[: m * k // 2].view(m, k // 2), gather(flat[m * k // 2 :], *nibble_indices(m, k, sm)))


def unpack(packed: Tensor, shape: tuple[int, int], sm: Sm) -> Tensor:
    """The dense weight (m, k) of a packed tensor, bit for bit.

    Raises:
        UsageError, FormatError: as for `neutral_form`; or a metadata nibble is not idx0 < idx1.
    """
    return unpack_2_4(neutral_form(packed, shape, sm), shape[1])
