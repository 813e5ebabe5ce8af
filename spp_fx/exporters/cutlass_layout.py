"""The two tensors that PyTorch's CUTLASS kernels take for a sparse weight, built without torch's converter.

`packed` (m, k/2) holds the kept entries row-major, `meta` their positions: the nibbles of `sparsity.packing`
in units, each the nibbles of some columns of one row, the units in an order of their own. float32 is 1:2.

| dtype             | pattern | meta               | unit       | class takes multiples of |
|-------------------|---------|--------------------|------------|--------------------------|
| float16, bfloat16 | 2:4     | (m, k/16) int16    | 16 columns | 32 x 64                  |
| int8              | 2:4     | (m, k/32) int32    | 32 columns | 16 x 128                 |
| float32           | 1:2     | (m, k/8) int16     | 8 columns  | 32 x 32                  |

The order of units is that of CUTLASS' `reorder_meta` (tools/util/include/cutlass/util/host_reorder.h) stored
as `ColumnMajorInterleaved<2>`: see `fill_tiles`. PyTorch has both in torch/sparse/_semi_structured_conversions.py,
the shapes in `SparseSemiStructuredTensorCUTLASS`, torch/sparse/semi_structured.py.

For a weight that holds its pattern the bytes are those of torch's converter, but for negative zeros, which
that makes positive. It also drops entries of a weight that does not hold its pattern; here that is an error.
`cutlass_reader` reads the form back, by tables of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.sparsity.packing import Packed24, kernels, pack_1_2, pack_2_4


@dataclass(frozen=True)
class Form:
    """What the CUTLASS form of a dtype is.

    Attributes:
        group: columns that share half as many slots: 4 (2:4) or 2 (1:2).
        meta: dtype of a unit.
        columns: of the weight that a unit describes.
        rows: that the order of units is made of: a tile is this many rows of two units.
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
    """Why PyTorch's CUTLASS class cannot take a weight, or None where it can.

    Args:
        shape: of the dense weight, (out features, in features).
        dtype: of the weight.
    """
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


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a dense sparse weight.

    Args:
        weight: (m, k) float16, bfloat16 or int8, already 2:4, or float32, already 1:2; m and k multiples of
            what `FORMS` says.

    Returns:
        packed (m, k/2) of weight's dtype, and meta as in the table above.

    Raises:
        UsageError: `refusal` has a reason.
        PatternError: the weight does not hold its pattern, see `pack_2_4`.
    """
    form = _form(tuple(weight.shape), weight.dtype)
    return from_neutral(pack_2_4(weight) if form.group == 4 else pack_1_2(weight))


def from_neutral(neutral: Packed24) -> tuple[Tensor, Tensor]:
    """Pack the layout-neutral form (of float32 the 1:2 one) of a weight; see `pack`."""
    m, k = neutral.shape
    form = _form((m, k), neutral.values.dtype)
    meta = torch.empty((m, k // form.columns), dtype=form.meta, device=neutral.values.device)
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


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> Form:
    if reason := refusal(shape, dtype):
        raise UsageError(f"cannot pack for CUTLASS: {reason}")
    return FORMS[dtype]
