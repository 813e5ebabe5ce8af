"""Fold: the effective weight of an adapter, rounded once to the stored dtype, with every zero where it was.

A method's compiled fold gives the same bits as its definition while values stay finite and non-zero. Other rows, and
all rows of a method without one, are folded by the definition, which applies `--vanish` and reports errors by row and
column. Only the definition needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from spp_fx.adapters.method import Factors, FactorSpec, FoldKernel, Method
from spp_fx.errors import MaskError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Elements that the definition folds at once; the float64 temporaries of a block take some 100 MB."""
FLOATING: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The dtypes that can be folded, as numpy dtypes; 16-bit floats as their bits."""
Stored: TypeAlias = "NDArray[Any]"
Vanish = Literal["keep", "error", "allow"]
"""What a non-zero that would fold to zero becomes: the smallest normal number of its sign, an error, or zero."""


@dataclass
class FoldCounts:
    """Elements of a weight, as the fold meets them.

    Attributes:
        vanished: non-zeros whose folded value rounds to zero.
        changed: those whose stored value changed.
        removed: zeros that a dense update would have filled (`Method.masked` is False).
        removed_square, update_square: sum of squares of such an update, where the weight is zero and everywhere.
    """

    vanished: int = 0
    changed: int = 0
    removed: int = 0
    removed_square: float = 0.0
    update_square: float = 0.0

    def add(self, other: FoldCounts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def removed_share(self) -> float:
        """The share of the update's squared norm that lay where the weight is zero."""
        return self.removed_square / self.update_square if self.update_square else 0.0


@dataclass(frozen=True)
class StoredFold:
    """The fold of one stored matrix, some rows at a time, on any thread.

    Attributes:
        shape: (out, in) of the canonical matrix that the factors belong to.
        factors: of that matrix, float64.
        dtype: of the stored matrix, one of `FLOATING`.
        where: the stored tensor, for errors.
        first_row: the row of the canonical matrix that the stored one begins with.
        taken: the columns of the canonical matrix to fold; None for all.
    """

    method: Method
    shape: tuple[int, ...]
    factors: Mapping[str, NDArray[np.float64]]
    dtype: str
    vanish: Vanish
    where: str
    first_row: int = 0
    taken: tuple[int, int] | None = None

    def rows(self, stored: Stored, out: Stored, start: int) -> FoldCounts:
        """Fold rows start.. of the stored matrix.

        Args:
            stored: (rows, in) of `FLOATING`'s dtype; may be a transposed view.
            out: for the folded rows; the same shape and dtype, no memory shared with `stored`.

        Raises:
            MaskError: a value is not finite, or underflows to zero under `error`; names row and column.
        """
        if self._kernel is not None:
            changed, to_zero, non_finite = self._kernel(stored, out, self.first_row + start)
            if not to_zero and not non_finite:
                return FoldCounts(0, changed)
        return self._by_definition(stored, out, start)

    def columns(self, start: int, stop: int) -> StoredFold:
        """The fold of some columns of the matrix."""
        return replace(self, taken=(start, stop))

    @cached_property
    def _own_factors(self) -> dict[str, NDArray[np.float64]]:
        specs = self.method.factors(self.shape)
        return {key: value[specs[key].index(None, self.taken)] for key, value in self.factors.items()}

    @cached_property
    def _kernel(self) -> FoldKernel | None:
        return self.method.fold_kernel(self._own_factors, self.dtype)

    def _by_definition(self, stored: Stored, out: Stored, start: int) -> FoldCounts:
        import torch

        from spp_fx.storage.safetensors import torch_dtype

        weight = torch.from_numpy(np.ascontiguousarray(stored)).view(torch_dtype(self.dtype))
        factors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in self._own_factors.items()}
        held = {"<u2": torch.uint16, "<f4": torch.float32, "<f8": torch.float64}[FLOATING[self.dtype].str]
        counts, row = FoldCounts(), 0
        for block in fold_matrix(
            self.method,
            weight,
            factors,
            self.vanish,
            counts,
            self.where,
            specs=self.method.factors(self.shape),
            first_row=self.first_row + start,
            named_from=(start, self.taken[0] if self.taken else 0),
        ):
            out[row : row + block.shape[0]] = block.view(held).numpy()
            row += block.shape[0]
        return counts


def fold_matrix(
    method: Method,
    weight: Tensor,
    factors: Factors,
    vanish: Vanish,
    counts: FoldCounts,
    where: str,
    *,
    specs: Mapping[str, FactorSpec] | None = None,
    first_row: int = 0,
    named_from: tuple[int, int] = (0, 0),
) -> Iterator[Tensor]:
    """Fold rows of a weight by the definition, in float64, rounded once to nearest even; zeros keep their bits.

    Args:
        weight: rows first_row.. of a canonical weight, (rows, in) of a floating dtype.
        factors: for all rows of the weight and for these columns, any floating dtype.
        counts: added to.
        where: the stored tensor, for errors.
        specs: of the factors; None where `weight` is the whole weight.
        named_from: row and column of the first element of `weight` in errors.

    Yields:
        Folded rows in the dtype of `weight`, at most `BLOCK_ELEMENTS` elements but at least one row.

    Raises:
        MaskError: a value is not finite, or underflows to zero under `error`; names row and column.
    """
    specs = method.factors(tuple(weight.shape)) if specs is None else specs
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        taken = first_row + start, first_row + start + rows.shape[0]
        own = {key: value[specs[key].index(taken)].double() for key, value in factors.items()}
        yield _fold_block(method, rows, own, vanish, counts, where, (named_from[0] + start, named_from[1]))


def _fold_block(
    method: Method,
    weight: Tensor,
    factors: Factors,
    vanish: Vanish,
    counts: FoldCounts,
    where: str,
    named_from: tuple[int, int],
) -> Tensor:
    import torch

    wide = weight.double()
    update = method.update(wide, **factors)
    nonzero = weight != 0
    if not method.masked:
        removed = update[~nonzero]
        counts.removed += int(removed.count_nonzero())
        counts.removed_square += float(removed.square().sum())
        counts.update_square += float(update.square().sum())
    exact = wide + update
    del wide, update  # in float64 they are most of a block's memory
    folded = round_once(exact, weight.dtype)
    if not folded.isfinite().all():
        row, column = _first(~folded.isfinite())
        raise MaskError(
            f"{where}: {_name(named_from, row, column)} folds to {folded[row, column].item()} "
            f"(weight {weight[row, column].item()}); nothing is written. Train with a lower --lr"
        )
    to_zero = nonzero & (folded == 0)
    if count := int(to_zero.sum()):
        counts.vanished += count
        if vanish == "error":
            raise MaskError(
                f"{where}: {_name(named_from, *_first(to_zero))} would fold to zero, and at least {count - 1} more; "
                "use --vanish keep"
            )
        if vanish == "keep":
            # With the value's own sign; an exact zero takes that of the weight.
            smallest = torch.tensor(torch.finfo(weight.dtype).tiny, dtype=weight.dtype)
            sign = torch.where(exact == 0, weight.double(), exact).to(weight.dtype)
            folded = torch.where(to_zero, torch.copysign(smallest, sign), folded)
    folded = torch.where(nonzero, folded, weight)
    counts.changed += int((folded != weight).sum())
    return folded


def _name(named_from: tuple[int, int], row: int, column: int) -> str:
    return f"row {named_from[0] + row}, column {named_from[1] + column}"


def _first(flags: Tensor) -> tuple[int, int]:
    """Row and column of the first true element of a matrix."""
    import torch

    index = int(flags.flatten().to(torch.uint8).argmax())
    return index // flags.shape[1], index % flags.shape[1]


def round_stored(value: NDArray[np.float64], dtype: str) -> Stored:
    """float64 to the numbers of a stored dtype (one of `FLOATING`), rounded once to nearest even; without torch."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            plain = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
            return value.astype(plain).view(FLOATING[dtype])
        # To odd in float32, as in `round_once`.
        single = value.astype("<f4")
        bits = single.view("<i4").astype(np.int64)
        error = value - single
    away = (error != 0) & (bits & 1 == 0) & np.isfinite(single)
    bits = (bits + np.where(away, np.where((error > 0) == (value > 0), 1, -1), 0)) & 0xFFFFFFFF
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a floating dtype, rounded once to nearest even.

    torch converts to 16 bits through float32, which rounds twice. Rounding to odd in float32 makes the second
    rounding exact (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    import torch

    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    single = value.to(torch.float32)
    bits = single.view(torch.int32)
    error = value - single.double()
    away = (error != 0) & (bits & 1 == 0) & single.isfinite()
    # The value was rounded to an even neighbour: take the odd one on its other side.
    toward = torch.where((error > 0) == (value > 0), 1, -1).to(torch.int32)
    return torch.where(away, bits + toward, bits).view(torch.float32).to(dtype)
