"""Fold: the weight an adapter stands for, rounded once, with every zero where it was."""

from collections.abc import Iterator

import torch
from torch import Tensor

from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.adapters.method import Factors, Method
from spp_fx.errors import MaskError

BLOCK_ELEMENTS = 1 << 22
"""Elements folded at once; the float64 temporaries of a block take some 100 MB."""


def fold_rows(
    method: Method,
    weight: Tensor,
    factors: Factors,
    start: int,
    vanish: Vanish,
    counts: FoldCounts,
    where: str,
    row_offset: int = 0,
    column_offset: int = 0,
) -> Tensor:
    """Rows start.. of the folded weight, in the stored dtype.

    Computed in float64 and rounded once, to nearest even, so each element is within half a unit in
    the last place of the formula's value. Zeros keep their bits.

    Args:
        method: the adapter method.
        weight: rows of the canonical weight, (rows, in) of a floating dtype.
        factors: of the whole weight, (…, in) and (out, …), any floating dtype.
        start: index of the first of these rows in the weight.
        vanish: what to do with a non-zero that would become zero: `keep` the smallest normal number of
            its sign, `error`, or `allow` the new zero.
        counts: added to.
        where: the stored tensor, for errors.
        row_offset, column_offset: added to indices in errors, where the stored tensor is a part of the weight,
            or `weight` some columns of it.

    Raises:
        MaskError: a value is not finite, or one vanishes under `error`; names row and column.
    """
    own = {key: value.double() for key, value in method.rows(factors, start, start + weight.shape[0]).items()}
    exact = method.effective_weight(weight.double(), **own)
    folded = round_once(exact, weight.dtype)
    nonzero = weight != 0
    if not folded.isfinite().all():
        row, column = first(~folded.isfinite())
        place = f"row {start + row_offset + row}, column {column_offset + column}"
        raise MaskError(
            f"{where}: {place} folds to {folded[row, column].item()} "
            f"(weight {weight[row, column].item()}); nothing is written. Train with a lower --lr"
        )
    gone = nonzero & (folded == 0)
    count = int(gone.sum())
    if count:
        counts.vanished += count
        if vanish == "error":
            row, column = first(gone)
            raise MaskError(
                f"{where}: row {start + row_offset + row}, column {column_offset + column} would fold to zero, "
                f"and at least {count - 1} more; "
                "keep them with --vanish keep"
            )
        if vanish == "keep":
            # The value's own sign; where it is exactly zero and has none, the one that the weight had.
            smallest = torch.tensor(torch.finfo(weight.dtype).tiny, dtype=weight.dtype)
            sign = torch.where(exact == 0, weight.double(), exact).to(weight.dtype)
            folded = torch.where(gone, torch.copysign(smallest, sign), folded)
    folded = torch.where(nonzero, folded, weight)
    counts.changed += int((folded != weight).sum())
    return folded


def fold_matrix(
    method: Method,
    weight: Tensor,
    factors: Factors,
    vanish: Vanish,
    counts: FoldCounts,
    where: str,
    first_row: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
) -> Iterator[Tensor]:
    """The folded rows first_row.. of a weight, of which `weight` are those rows, in blocks of bounded size."""
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        yield fold_rows(
            method, rows, factors, first_row + start, vanish, counts, where, row_offset, column_offset
        )


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a floating dtype by one rounding to nearest even.

    torch goes to half precision through float32, which rounds twice; rounding to odd on the way there
    makes the second rounding the only one that counts (Boldo and Melquiond, 2008).
    """
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    single = value.to(torch.float32)
    bits = single.view(torch.int32)
    error = value - single.double()
    away = (error != 0) & (bits & 1 == 0) & single.isfinite()
    # An even neighbour was chosen although the value is not on it: take the odd one on the value's side.
    toward = torch.where((error > 0) == (value > 0), 1, -1).to(torch.int32)
    return torch.where(away, bits + toward, bits).view(torch.float32).to(dtype)


def first(flags: Tensor) -> tuple[int, int]:
    """Row and column of the first true element of a matrix."""
    index = int(flags.flatten().to(torch.uint8).argmax())
    return index // flags.shape[1], index % flags.shape[1]
