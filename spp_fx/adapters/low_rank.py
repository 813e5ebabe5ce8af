"""Tile and pullback of methods whose update is a product of two small matrices, for any dtype and device.

B A of a tile is one product; what follows is one compiled pass over the tile while it lies in the cache (`cpu`),
else some of torch's expressions. With H = G times what B A is multiplied by, the
factors' gradients are two small products: dB = s H Aᵀ and dA = s Bᵀ H.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spp_fx.adapters import op
from spp_fx.adapters.method import work_dtype
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
        # With `out=`, here and below, autocast leaves a product alone.
        b, a = self._factors(adapted)
        for first, last in adapted.tiles(start, stop, op.TILE_ELEMENTS):
            product = workspace("product", last - first, a.shape[1], a.dtype, a.device)
            torch.mm(b[first:last], a, out=product)
            target = out[first - start : last - start]
            if (cpu := _cpu(adapted, out.dtype)) is not None:
                scale, own = self.scale, base + self.offset
                cpu.low_rank_tile(adapted, first, last, self.multiplier, scale, own, product, target)
            else:
                self._combine(adapted.rows.take(first, last), product, base, target)

    def pullback(
        self, adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]
    ) -> None:
        """Add the factors' gradients from rows start..stop of G to `grads`."""
        b, a = self._factors(adapted)
        right = torch.zeros_like(a)
        for first, last in adapted.tiles(start, stop, op.TILE_ELEMENTS):
            g = grad[first - start : last - start]
            h = workspace("product", last - first, a.shape[1], a.dtype, a.device)
            if (cpu := _cpu(adapted, grad.dtype)) is not None:
                cpu.low_rank_gradient(adapted, first, last, self.pulled_back, g, h)
            elif self.pulled_back == "one":
                h.copy_(g)
            else:
                weight = adapted.rows.take(first, last)
                h.copy_(g).mul_(weight != 0 if self.pulled_back == "mask" else weight)
            left = torch.mm(h, a.t(), out=h.new_empty(last - first, a.shape[0]))
            grads[self.left][first:last].add_(left, alpha=self.scale)
            torch.addmm(right, b[first:last].t(), h, out=right)
        grads[self.right].add_(right, alpha=self.scale)

    def _factors(self, adapted: AdaptedWeight) -> tuple[Tensor, Tensor]:
        """B and A in the dtype of the work."""
        b, a = adapted.factors[self.left], adapted.factors[self.right]
        work = work_dtype(torch.empty(0, dtype=adapted.rows.dtype), b, a)
        return b.to(work), a.to(work)

    def _combine(self, weight: Tensor, product: Tensor, base: float, out: Tensor) -> None:
        """base * W + M * (s product + offset), by way of `product` itself."""
        product.mul_(self.scale)
        if self.multiplier == "weight":
            product.add_(base + self.offset).mul_(weight)
        else:
            if self.multiplier == "mask":
                product.mul_(weight != 0)
            if base:
                product.add_(weight, alpha=base)
        out.copy_(product)


def _cpu(adapted: AdaptedWeight, other: torch.dtype):
    """The compiled loops, where they take these types and are faster than torch."""
    cpu = optional_module("spp_fx.adapters.cpu") if adapted.device.type == "cpu" else None
    return cpu if cpu is not None and cpu.low_rank_takes(adapted, other) else None
