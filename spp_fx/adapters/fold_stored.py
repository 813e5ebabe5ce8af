"""Fold on stored numbers: compiled where a method has a kernel, by its definition wherever a value needs a decision.

The kernels (`_fold_numba`) give the bits of `fold.fold_rows` for values that stay finite and away from zero. A
span in which one does not is folded again by the definition, which knows what `--vanish` asks for and how to
name the place of an error. A method or an installation without kernels is always folded by the definition.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.adapters.method import Method

FLOATING: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The dtypes that can be folded, and how numpy holds their stored numbers: halves as their bits."""

Stored: TypeAlias = "NDArray[Any]"
Kernel: TypeAlias = "Callable[[Stored, Stored, int], tuple[int, int, int]]"
"""(stored rows, out, index of the first row in the site's matrix) -> changed, vanished, not finite."""


@dataclass(frozen=True)
class StoredFold:
    """The fold of one matrix, span by span; may be called from several threads.

    Attributes:
        method: the adapter method.
        factors: of the whole canonical matrix, float64.
        dtype: of the stored matrix, one of `FLOATING`.
        vanish: what to do with a non-zero that would become zero.
        where: the stored tensor, for errors.
        first_row: the row of the site's matrix that the stored one begins with.
        first_column: the column that it begins with, where it is a part.
    """

    method: Method
    factors: Mapping[str, NDArray[np.float64]]
    dtype: str
    vanish: Vanish
    where: str
    first_row: int
    first_column: int = 0

    def rows(self, stored: Stored, out: Stored, start: int) -> FoldCounts:
        """Fold rows start.. of the stored matrix.

        Args:
            stored: (rows, in) of `FLOATING`'s type; a transposed view will do.
            out: takes the folded rows; the same shape and type, no memory shared with `stored`.
            start: index of the first of these rows in the stored matrix.

        Raises:
            MaskError: a value is not finite, or one vanishes under `error`; names row and column.
        """
        if self._kernel is not None:
            changed, gone, strange = self._kernel(stored, out, self.first_row + start)
            if not gone and not strange:
                return FoldCounts(0, changed)
        return self._by_definition(stored, out, start)

    def columns(self, start: int, stop: int) -> "StoredFold":
        """The fold of some columns of the matrix."""
        own = self.method.columns(self.factors, start, stop)
        return replace(self, factors=own, first_column=self.first_column + start)

    @cached_property
    def _kernel(self) -> "Kernel | None":
        make = KERNELS.get(self.method.name)
        kernels = _compiled()
        return None if make is None or kernels is None else make(self, kernels)

    def _by_definition(self, stored: Stored, out: Stored, start: int) -> FoldCounts:
        import torch

        from spp_fx.adapters.fold import fold_matrix
        from spp_fx.storage.safetensors import torch_dtype

        weight = torch.from_numpy(np.ascontiguousarray(stored)).view(torch_dtype(self.dtype))
        factors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in self.factors.items()}
        counts, row = FoldCounts(), 0
        for block in fold_matrix(
            self.method,
            weight,
            factors,
            self.vanish,
            counts,
            self.where,
            first_row=self.first_row + start,
            row_offset=-self.first_row,
            column_offset=self.first_column,
        ):
            out[row : row + block.shape[0]] = block.view(_held_as(self.dtype)).numpy()
            row += block.shape[0]
        return counts


def _held_as(dtype: str) -> Any:
    import torch

    return {"<u2": torch.uint16, "<f4": torch.float32, "<f8": torch.float64}[FLOATING[dtype].str]


@cache
def _compiled() -> Any:
    """The compiled kernels, None where numba is not there."""
    try:
        from spp_fx.adapters import _fold_numba
    except ImportError:
        return None
    return _fold_numba


def _spp(fold: StoredFold, kernels: Any) -> Kernel:
    kernel = {"BF16": kernels.bfloat16, "F16": kernels.float16}.get(fold.dtype, kernels.wide)
    alpha, beta = fold.factors["spp_alpha"], fold.factors["spp_beta"]
    scaled = fold.method.scale * beta[:, 0]
    height = beta.shape[0] // alpha.shape[0]
    return lambda stored, out, start: kernel(stored, alpha, scaled[start:], height, start, out)


KERNELS: dict[str, Callable[[StoredFold, Any], Kernel]] = {"spp": _spp}
"""By method: what makes its kernel for one matrix."""
