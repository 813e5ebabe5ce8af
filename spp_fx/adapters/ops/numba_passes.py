"""The two passes over a bfloat16 W on a CPU, which unpack and scale a row while it lies in the first cache.

They run on one core, and need a third of the time that torch's expressions take on two. In float32 it was
the other way round: twice the bytes, which one core cannot move as fast as two.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spp_fx.adapters.ops import _numba_kernels as kernels
from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.arrays import as_array
from spp_fx.adapters.ops.packed_rows import PackedRows2of4, PackedRowsBitmask
from spp_fx.adapters.ops.rows import Rows

FEW_THREADS = 6
"""With more, torch's expressions are taken: three times two cores' worth, reckoned from two, not measured."""
NO_INDEX, NO_OFFSETS = np.zeros((1, 1), np.uint8), np.zeros(1, np.int64)


def takes(adapted: Adapted, other: torch.dtype) -> bool:
    """Whether the kernels have these types, and are the faster; `other` is that of W' or of G."""
    return (
        torch.get_num_threads() <= FEW_THREADS
        and adapted.rows.dtype == torch.bfloat16
        and adapted.alpha.dtype == adapted.beta.dtype == torch.float32
        and other in (torch.bfloat16, torch.float32)
    )


def build(adapted: Adapted, start: int, stop: int, base: float, out: Tensor) -> Tensor:
    """`passes.build` for types that `takes` takes."""
    target = out[: stop - start]
    _check(adapted, target, start, stop)
    factors, scale, buffer = _factors(adapted)
    kernels.build(
        *_storage(adapted.rows, start, stop), *factors, start, adapted.height, scale, np.float32(base), buffer,
        as_array(target),
    )  # fmt: skip
    return target


def reduce_gradient(
    adapted: Adapted, g: Tensor, start: int, stop: int, dalpha: Tensor, dbeta: Tensor
) -> None:
    """`passes.reduce_gradient` for types that `takes` takes."""
    _check(adapted, g, start, stop)
    factors, scale, buffer = _factors(adapted)
    kernels.reduce_gradient(
        *_storage(adapted.rows, start, stop), *factors, start, adapted.height, scale, buffer,
        as_array(g.contiguous()), as_array(dalpha), as_array(dbeta),
    )  # fmt: skip


def _check(adapted: Adapted, other: Tensor, start: int, stop: int) -> None:
    """Compiled loops do not look where they write."""
    m, n = adapted.rows.shape
    if other.shape != (stop - start, n) or not 0 <= start <= stop <= m:
        raise ValueError(f"{tuple(other.shape)} are no rows {start} to {stop} of a weight {(m, n)}")


def _factors(adapted: Adapted) -> tuple[tuple[Any, Any], np.float32, Any]:
    """alpha and beta, s, and a buffer for one row of W."""
    alpha, beta = as_array(adapted.alpha.contiguous()), as_array(adapted.beta.contiguous())
    return (alpha, beta), np.float32(adapted.scale), np.empty(alpha.shape[1], np.uint16)


def _storage(rows: Rows, start: int, stop: int) -> tuple[int, Any, Any, Any]:
    """Kind, values, index and offsets of rows start..stop."""
    if isinstance(rows, PackedRows2of4):
        values, index = rows.values[start:stop], rows.positions[start:stop]
        return kernels.TWO_OF_FOUR, as_array(values.reshape(-1)), as_array(index), NO_OFFSETS
    if isinstance(rows, PackedRowsBitmask):
        index, offsets = as_array(rows.bits[start:stop]), as_array(rows.offsets[start : stop + 1])
        return kernels.BITMASK, as_array(rows.values), index, offsets
    return kernels.DENSE, as_array(rows.take(start, stop).reshape(-1)), NO_INDEX, NO_OFFSETS
