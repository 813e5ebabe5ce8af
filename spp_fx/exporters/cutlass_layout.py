"""The two tensors that PyTorch's CUTLASS kernels take for a sparse weight.

| dtype             | pattern | packed   | meta            | a unit     | m, k are multiples of |
|-------------------|---------|----------|-----------------|------------|-----------------------|
| float16, bfloat16 | 2:4     | (m, k/2) | (m, k/16) int16 | 16 columns | 32, 64                |
| int8              | 2:4     | (m, k/2) | (m, k/32) int32 | 32 columns | 16, 128               |
| float32           | 1:2     | (m, k/2) | (m, k/8) int16  | 8 columns  | 32, 32                |

`packed` holds the kept entries row-major, `meta` their positions: the nibbles of `sparsity.packing` in units, each
the nibbles of some columns of one row. The order of units is that of CUTLASS' `reorder_meta`
(tools/util/include/cutlass/util/host_reorder.h) stored as `ColumnMajorInterleaved<2>`. PyTorch has both in
torch/sparse/_semi_structured_conversions.py, and the shapes in torch/sparse/semi_structured.py.

The bytes equal those of torch's converter, except that the converter makes negative zeros positive. Writing permutes
axes; reading goes by a table of offsets and uses no code of the writer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.errors import FormatError, UsageError
from spp_fx.sparsity.packing import (
    Packed24,
    for_row_chunks,
    kernels,
    pack_1_2,
    pack_2_4,
    unpack_1_2,
    unpack_2_4,
)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """The form of a dtype.

    Attributes:
        group: columns that share half as many slots: 4 (2:4) or 2 (1:2).
        meta: dtype of a unit.
        columns: of the weight that a unit describes.
        rows: of a tile, which has two columns of units.
        multiples: of rows and columns that PyTorch's class takes.
    """

    group: int
    meta: torch.dtype
    columns: int
    rows: int
    multiples: tuple[int, int]


FORMS = {
    torch.float16: Form(4, torch.int16, 16, 32, (32, 64)),
    torch.bfloat16: Form(4, torch.int16, 16, 32, (32, 64)),
    torch.int8: Form(4, torch.int32, 32, 16, (16, 128)),
    torch.float32: Form(2, torch.int16, 8, 32, (32, 32)),
}


def refusal(shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why PyTorch's CUTLASS class cannot take a weight (out, in) of a dtype, or None where it can."""
    name = str(dtype).removeprefix("torch.")
    form = FORMS.get(dtype)
    if form is None:
        known = ", ".join(str(known).removeprefix("torch.") for known in FORMS)
        return f"PyTorch's CUTLASS kernels do not take {name}, but {known}"
    if len(shape) != 2:
        return f"shape {tuple(shape)} is not a matrix"
    rows, columns = form.multiples
    if shape[0] == 0 or shape[1] == 0 or shape[0] % rows or shape[1] % columns:
        return (
            f"shape {shape[0]} x {shape[1]}: PyTorch's CUTLASS class takes {name} of rows in multiples of "
            f"{rows} and columns in multiples of {columns}"
        )
    return None


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> Form:
    if reason := refusal(shape, dtype):
        raise UsageError(f"not a CUTLASS pack: {reason}")
    return FORMS[dtype]


# Writing


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a dense sparse weight.

    Args:
        weight: (m, k) of a dtype in `FORMS`, which holds that dtype's pattern.

    Returns:
        packed (m, k/2) of weight's dtype, and meta.

    Raises:
        UsageError: `refusal` has a reason.
        PatternError: the weight does not hold its pattern, see `pack_2_4`.
    """
    form = _form(tuple(weight.shape), weight.dtype)
    neutral = pack_2_4(weight) if form.group == 4 else pack_1_2(weight)
    m, k = weight.shape
    meta = torch.empty((m, k // form.columns), dtype=form.meta, device=weight.device)
    fill(neutral.positions, meta, 0)
    return neutral.values, meta


def fill(positions: Tensor, meta: Tensor, first_row: int) -> None:
    """Write the positions of some rows into `meta`.

    Args:
        positions: (r, bytes) uint8 of `Packed24`, contiguous; r a multiple of 32 (of 16 where meta is int32).
        meta: (m, n) int16 or int32, contiguous.
        first_row: number of the first of these rows in the weight, a multiple as r.
    """
    m, n = meta.shape
    lines = 4 if meta.dtype == torch.int16 else 2
    rows = 8 * lines
    # Two columns of units are a strip, in it tiles follow one another downwards.
    tiles = meta.view(n // 4, 2, m // rows, 1, 8, 2 * lines).transpose(1, 2)
    band = slice(first_row // rows, (first_row + len(positions)) // rows)
    fill_tiles(positions.view(meta.dtype), tiles[:, band])


def fill_tiles(units: Tensor, meta: Tensor) -> None:
    """Write units of metadata into tiles of 8 l rows and two units.

    In a tile, for each r of 0..7, the units of rows r, r + 8, ... are beside one another: two lines of the
    first column, the same two lines of the second column, then (l = 4) the same of lines 2 and 3:
    (r, 0) (r+8, 0) (r, 1) (r+8, 1) (r+16, 0) (r+24, 0) (r+16, 1) (r+24, 1).

    Args:
        units: (8 l t R, 4 C) int16 (l = 4) or int32 (l = 2), row-major, contiguous.
        meta: [C, R, 2, t, 8, 2 l], a view of units in memory: column C of panels of four units, its left and
            right tiles, row R of bands of t tiles.
    """
    if compiled := kernels(meta):
        compiled.fill_tiles(units.numpy(), meta.numpy())
        return
    panels, bands, _, tiles, _, width = meta.shape
    lines = units.view(bands, tiles, width // 4, 2, 8, panels, 2, 2)  # R t pair line r C tile column
    meta.view(panels, bands, 2, tiles, 8, width // 4, 2, 2).copy_(lines.permute(5, 0, 6, 1, 4, 2, 7, 3))


# Reading


def nibble_indices(m: int, groups: int, meta: torch.dtype) -> tuple[Indices, Indices]:
    """Where nibbles are in the metadata of m rows: that of group j of row i at rows[i] + groups[j].

    These are the steps of CUTLASS' `reorder_meta` and `ColumnMajorInterleaved<2>`, one after the other.

    Args:
        m, groups: rows, and groups (or pairs) a row.
        meta: int16, units of four nibbles, or int32, units of eight.

    Returns:
        rows (m,) and groups (groups,), in nibbles.
    """
    nibbles = 2 * meta.itemsize
    height, apart = (32, 4) if meta == torch.int16 else (16, 2)
    row, group = np.arange(m), np.arange(groups)
    # Rows r, r + 8, ... of a tile are put together.
    row = row // height * height + row % 8 * apart + row % height // 8
    # Column-major, two columns interleaved: unit (row, column) at column // 2 * 2 m + 2 row + column % 2, once
    # the top right and the bottom left of every 2 x 2 units are swapped: then an odd row adds 1 in
    # them, and an odd column 2.
    column = group // nibbles
    below = 2 * (row - row % 2) + row % 2
    beside = column // 2 * 2 * m + 2 * (column % 2)
    return nibbles * below, nibbles * beside + group % nibbles


def neutral_form(packed: Tensor, meta: Tensor) -> Packed24:
    """The layout-neutral form (of float32 the 1:2 one) of the two tensors of a weight.

    Raises:
        UsageError: `refusal` has a reason.
        FormatError: meta is of another dtype or shape.
    """
    m, k = packed.shape[0], 2 * packed.shape[1]
    form = _form((m, k), packed.dtype)
    if meta.dtype != form.meta or meta.shape != (m, k // form.columns):
        raise FormatError(
            f"metadata is {meta.dtype} of shape {tuple(meta.shape)}, a weight of {m} x {k} needs "
            f"{form.meta} of shape ({m}, {k // form.columns})"
        )
    positions = gather(meta.detach().cpu().contiguous(), *nibble_indices(m, k // form.group, form.meta))
    return Packed24(packed.detach().cpu(), positions)


def unpack(packed: Tensor, meta: Tensor) -> Tensor:
    """The dense weight (m, k) of its two tensors, bit for bit.

    Raises:
        UsageError, FormatError: as for `neutral_form`; or a metadata nibble is invalid.
    """
    form = FORMS[packed.dtype]
    return (unpack_2_4 if form.group == 4 else unpack_1_2)(neutral_form(packed, meta), 2 * packed.shape[1])


def gather(meta: Tensor, rows: Indices, groups: Indices) -> Tensor:
    """Positions in row-major order, from metadata in another order.

    Args:
        meta: metadata, two nibbles a byte, the low one first; contiguous, on the CPU.
        rows, groups: the nibble of group j of row i is number rows[i] + groups[j]; an even number of groups.

    Returns:
        (rows, groups/2) uint8, as in `Packed24`.
    """
    positions = torch.empty((len(rows), len(groups) // 2), dtype=torch.uint8)
    data = meta.reshape(-1).view(torch.uint8).numpy()
    compiled = kernels(positions)

    def work(start: int, stop: int) -> None:
        if compiled:
            compiled.gather_nibbles(data, rows[start:stop], groups, positions[start:stop].numpy())
            return
        at = rows[start:stop, None] + groups
        found = data[at >> 1] >> ((at & 1) << 2).astype(np.uint8) & 0xF
        positions[start:stop] = torch.from_numpy(found[:, 0::2] | found[:, 1::2] << 4)

    for_row_chunks(work, len(rows), 4 * len(groups))
    return positions
