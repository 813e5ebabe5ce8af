"""Methods whose update is a product of two small matrices, with their tile and pullback for any dtype and device.

B A is made tile by tile in the cache: by compiled loops (`low_rank_kernels`), by a Triton kernel (`gpu`), or by torch.
With H = G times what B A is multiplied by, the factors' gradients are two small products: dB = s H Aᵀ and dA = s Bᵀ H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from spp_fx.adapters import fold
from spp_fx.adapters.method import Factors, FactorSpec, FoldKernel, Kernels, Method, Run, work_dtype
from spp_fx.compiled import optional_module

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from spp_fx.adapters.op import AdaptedWeight

Multiplier = Literal["one", "mask", "weight"]
"""What a product B A or a gradient G is multiplied by, entry by entry: nothing, (W != 0), or W."""
ONE, MASK, WEIGHT = 0, 1, 2
MULTIPLIERS: dict[Multiplier, int] = {"one": ONE, "mask": MASK, "weight": WEIGHT}
"""As compiled kernels take them."""


@dataclass(frozen=True)
class LowRankMethod(Method):
    """A method whose update is M * (s B A + offset); s is its option `scale`, or 1 if it has none.

    Attributes:
        left, right: names of the factors B (m, r), which starts at zero, and A (r, n).
        multiplier: M.
        pulled_back: what the gradient is multiplied by, H = G * M; another M if the method is straight-through.
        offset: other than 0 only where M is W.
    """

    left: ClassVar[str]
    right: ClassVar[str]
    multiplier: ClassVar[Multiplier]
    pulled_back: ClassVar[Multiplier]
    offset: ClassVar[float] = 0.0

    rank: int

    @property
    def factor(self) -> float:
        """s."""
        return getattr(self, "scale", 1.0)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        specs = {
            self.left: FactorSpec((*stack, m, self.rank), "zeros", rows=1),
            self.right: FactorSpec((*stack, self.rank, n), "kaiming", columns=1),
        }
        return dict(sorted(specs.items()))

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """A: the first right singular vectors of H, the gradient with respect to s B A."""
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        a = factors[self.right]
        if self.pulled_back != "one":
            grad = grad * (weight != 0 if self.pulled_back == "mask" else weight)
        return {**factors, self.right: at_norm_of(a, right_vectors(grad, len(a)))}

    def rate(self, run: Run) -> float:
        """The sum of `rank` products multiplies every weight, or else is added to it."""
        unit = 1.0 if self.multiplier == "weight" else run.spread
        return run.rate_of_product(self.factor, self.rank, unit)

    def product_grads(self, x: Tensor, grad_y: Tensor, factors: Factors, grads: dict[str, Tensor]) -> None:
        """`factor_grads` where H is G: dB = s dYᵀ (X Aᵀ) and dA = s (dY B)ᵀ X."""
        b, a = (factors[key].to(x.dtype) for key in (self.left, self.right))
        grads[self.left].add_(grad_y.t() @ (x @ a.t()), alpha=self.factor)
        grads[self.right].add_((grad_y @ b).t() @ x, alpha=self.factor)

    def kernels(self, device: str) -> Kernels | None:
        return LowRankKernels(self) if device in _COMPILED else None

    def fold_kernel(self, factors: Mapping[str, NDArray[np.float64]], dtype: str) -> FoldKernel | None:
        """torch's product of the rows that the definition multiplies at once, and one loop.

        Another product would add in another order, and so give other bits than the definition now and then.
        """
        cpu = optional_module("spp_fx.adapters.cpu") if self.masked else None
        if cpu is None:
            return None
        import torch

        kernel = cpu.FOLDS[dtype]
        b, a = (torch.from_numpy(np.ascontiguousarray(factors[key])) for key in (self.left, self.right))
        scale, by_weight = np.full(len(b), self.factor), self.multiplier == "weight"

        def run(stored: NDArray[Any], out: NDArray[Any], start: int) -> tuple[int, int, int]:
            counts, step = np.zeros(3, np.int64), max(1, fold.BLOCK_ELEMENTS // max(1, stored.shape[1]))
            for first in range(0, len(stored), step):
                rows = stored[first : first + step]
                product = torch.mm(b[start + first : start + first + len(rows)], a).numpy()
                counts += kernel(
                    rows, product, scale, 1, 0, self.offset, by_weight, out[first : first + step]
                )
            changed, to_zero, non_finite = counts.tolist()
            return changed, to_zero, non_finite

        return run


@dataclass(frozen=True)
class LowRankKernels:
    """`Kernels` of a low-rank method."""

    method: LowRankMethod

    def takes(self, adapted: AdaptedWeight, other: torch.dtype) -> bool:
        return True

    def tile(self, adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
        """Write rows start..stop of base * W + update into `out`."""
        import torch

        from spp_fx.adapters import op
        from spp_fx.adapters.rows import workspace

        b, a = self._factors(adapted)
        b = b[start:stop] * self.method.factor
        if (kernels := _compiled(adapted, out.dtype)) is not None:
            kind = MULTIPLIERS[self.method.multiplier]
            kernels.low_rank_tile(adapted, start, stop, kind, base + self.method.offset, b, a, out)
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
        import torch

        from spp_fx.adapters import op
        from spp_fx.adapters.rows import workspace

        method = self.method
        b, a = self._factors(adapted)
        if (kernels := _compiled(adapted, grad.dtype)) is not None:
            kind, own = MULTIPLIERS[method.pulled_back], b[start:stop]
            left, right = kernels.low_rank_pullback(adapted, grad, start, stop, kind, own, a)
        else:
            left, right = a.new_empty(stop - start, len(a)), torch.zeros_like(a)
            for first, last in adapted.tiles(start, stop, op.TILE_ELEMENTS):
                part = slice(first - start, last - start)
                h = workspace("product", last - first, a.shape[1], a.dtype, a.device).copy_(grad[part])
                if method.pulled_back != "one":
                    weight = adapted.rows.take(first, last)
                    h.mul_(weight != 0 if method.pulled_back == "mask" else weight)
                torch.mm(h, a.t(), out=left[part])
                torch.addmm(right, b[first:last].t(), h, out=right)
        grads[method.left][start:stop].add_(left, alpha=method.factor)
        grads[method.right].add_(right, alpha=method.factor)

    def _factors(self, adapted: AdaptedWeight) -> tuple[Tensor, Tensor]:
        """B and A in the dtype of the work."""
        import torch

        b, a = adapted.factors[self.method.left], adapted.factors[self.method.right]
        work = work_dtype(torch.empty(0, dtype=adapted.rows.dtype), b, a)
        return b.to(work), a.to(work)

    def _combine(self, weight: Tensor, product: Tensor, base: float, out: Tensor) -> None:
        """base * W + M * (product + offset), by way of `product` itself."""
        if self.method.multiplier == "weight":
            product.add_(base + self.method.offset).mul_(weight)
        else:
            if self.method.multiplier == "mask":
                product.mul_(weight != 0)
            if base:
                product.add_(weight, alpha=base)
        out.copy_(product)


_COMPILED = {"cpu": "spp_fx.adapters.low_rank_kernels", "cuda": "spp_fx.adapters.gpu"}


def _compiled(adapted: AdaptedWeight, other: torch.dtype):
    """A module of compiled kernels, where it takes these types and is faster than torch."""
    kernels = optional_module(_COMPILED[adapted.device.type])
    return kernels if kernels is not None and kernels.low_rank_takes(adapted, other) else None
