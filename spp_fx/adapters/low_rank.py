"""Tile and pullback of methods whose update is a product of two small matrices, for any dtype and device.

B A is made tile by tile in the cache: by compiled loops (`low_rank_kernels`), by a Triton kernel (`gpu`), or by torch.
With H = G times what B A is multiplied by, the factors' gradients are two small products: dB = s H Aᵀ and dA = s Bᵀ H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_fx.adapters import fold, op
from spp_fx.adapters.method import FoldKernel, work_dtype
from spp_fx.adapters.op import AdaptedWeight
from spp_fx.adapters.rows import workspace
from spp_fx.compiled import optional_module

Multiplier = Literal["one", "mask", "weight"]
"""What a product B A or a gradient G is multiplied by, entry by entry: nothing, (W != 0), or W."""


@dataclass(frozen=True)
class LowRank:
    """`Kernels` of the update M * (s B A + offset), where M is one, (W != 0) or W.

    Attributes:
        left, right: names of the factors B (m, r) and A (r, n).
        scale: s.
        multiplier: M.
        pulled_back: the same for the gradient: H = G * M; another one for a method that is straight-through.
        offset: other than 0 only where M is W.
    """

    left: str
    right: str
    scale: float
    multiplier: Multiplier
    pulled_back: Multiplier
    offset: float = 0.0

    def takes(self, adapted: AdaptedWeight, other: torch.dtype) -> bool:
        return adapted.device.type in ("cpu", "cuda")

    def tile(self, adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
        """Write rows start..stop of base * W + update into `out`."""
        b, a = self._factors(adapted)
        b = b[start:stop] * self.scale
        if (kernels := _compiled(adapted, out.dtype)) is not None:
            kernels.low_rank_tile(adapted, start, stop, self.multiplier, base + self.offset, b, a, out)
            return
        for first, last in adapted.tiles(start, stop, op.TILE_ELEMENTS):
            product = workspace("product", last - first, a.shape[1], a.dtype, a.device)
            # With `out=`, here and below, autocast leaves a product alone.
            torch.mm(b[first - start : last - start], a, out=product)
            self._combine(adapted.rows.take(first, last), product, base, out[first - start : last - start])

    def pullback(
        self, adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]
    ) -> None:
        """Add the factors' gradients from rows start..stop of G to `grads`."""
        b, a = self._factors(adapted)
        if (kernels := _compiled(adapted, grad.dtype)) is not None:
            own = b[start:stop]
            left, right = kernels.low_rank_pullback(adapted, grad, start, stop, self.pulled_back, own, a)
        else:
            left, right = a.new_empty(stop - start, len(a)), torch.zeros_like(a)
            for first, last in adapted.tiles(start, stop, op.TILE_ELEMENTS):
                part = slice(first - start, last - start)
                h = workspace("product", last - first, a.shape[1], a.dtype, a.device).copy_(grad[part])
                if self.pulled_back != "one":
                    weight = adapted.rows.take(first, last)
                    h.mul_(weight != 0 if self.pulled_back == "mask" else weight)
                torch.mm(h, a.t(), out=left[part])
                torch.addmm(right, b[first:last].t(), h, out=right)
        grads[self.left][start:stop].add_(left, alpha=self.scale)
        grads[self.right].add_(right, alpha=self.scale)

    def fold_kernel(self, factors: Mapping[str, NDArray[np.float64]], dtype: str) -> FoldKernel | None:
        """`Method.fold_kernel`: torch's product of the rows that the definition multiplies at once, and one loop.

        Another product would add in another order, and so give other bits than the definition now and then.
        """
        kernels = optional_module("spp_fx.adapters.low_rank_kernels")
        if kernels is None:
            return None
        kernel = {"BF16": kernels.fold_bfloat16, "F16": kernels.fold_float16}.get(dtype, kernels.fold_wide)
        b, a = (torch.from_numpy(np.ascontiguousarray(factors[key])) for key in (self.left, self.right))
        options = self.scale, self.offset, self.multiplier == "weight"

        def run(stored: NDArray[Any], out: NDArray[Any], start: int) -> tuple[int, int, int]:
            counts, step = np.zeros(3, np.int64), max(1, fold.BLOCK_ELEMENTS // max(1, stored.shape[1]))
            for first in range(0, len(stored), step):
                rows = stored[first : first + step]
                product = torch.mm(b[start + first : start + first + len(rows)], a).numpy()
                counts += kernel(rows, product, *options, out[first : first + step])
            changed, to_zero, non_finite = counts.tolist()
            return changed, to_zero, non_finite

        return run

    def _factors(self, adapted: AdaptedWeight) -> tuple[Tensor, Tensor]:
        """B and A in the dtype of the work."""
        b, a = adapted.factors[self.left], adapted.factors[self.right]
        work = work_dtype(torch.empty(0, dtype=adapted.rows.dtype), b, a)
        return b.to(work), a.to(work)

    def _combine(self, weight: Tensor, product: Tensor, base: float, out: Tensor) -> None:
        """base * W + M * (product + offset), by way of `product` itself."""
        if self.multiplier == "weight":
            product.add_(base + self.offset).mul_(weight)
        else:
            if self.multiplier == "mask":
                product.mul_(weight != 0)
            if base:
                product.add_(weight, alpha=base)
        out.copy_(product)


def _compiled(adapted: AdaptedWeight, other: torch.dtype):
    """A module of compiled kernels, where it takes these types and is faster than torch."""
    names = {"cpu": "spp_fx.adapters.low_rank_kernels", "cuda": "spp_fx.adapters.gpu"}
    kernels = optional_module(names[adapted.device.type])
    return kernels if kernels is not None and kernels.low_rank_takes(adapted, other) else None
