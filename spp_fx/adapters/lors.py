"""LoRS: a masked low-rank update whose gradients leave the mask out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
    SCALE_OPTION,
    Factors,
    FactorSpec,
    FoldKernel,
    Kernels,
    Method,
    Run,
    register,
)
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor

    from spp_fx.adapters.low_rank import LowRank


@register("lors")
@dataclass(frozen=True)
class LoRS(Method):
    """W + s (A B) * (W != 0), differentiated as if the mask were not there — LoRS, 2025, section 3.

    Its code leaves s out of the gradients of A and B; the paper's formulas have it, and so has this.
    """

    rank: int = option(16, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, f"{SCALE_OPTION[0]} LoRS writes it alpha / sqrt(r).", SCALE_OPTION[1])
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "lors_a": FactorSpec((*stack, m, self.rank), "zeros", rows=1),
            "lors_b": FactorSpec((*stack, self.rank, n), "kaiming", columns=1),
        }

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        change = self.scale * (factors["lors_a"] @ factors["lors_b"])
        # Forwards exactly `change` or 0, since x - x is 0 and 0 - x is exact; backwards that of `change` alone.
        return change + (change * (weight != 0) - change).detach()

    def kernels(self, device: str) -> Kernels | None:
        return self._low_rank()

    def fold_kernel(self, factors: Mapping[str, Any], dtype: str) -> FoldKernel | None:
        return self._low_rank().fold_kernel(factors, dtype)

    def _low_rank(self) -> LowRank:
        from spp_fx.adapters.low_rank import LowRank

        return LowRank("lors_a", "lors_b", self.scale, multiplier="mask", pulled_back="one")

    def factor_grads(  # pyright: ignore[reportIncompatibleVariableOverride] - a function is a class variable
        self, x: Tensor, grad_y: Tensor, weight: Tensor, factors: Factors, grads: dict[str, Tensor]
    ) -> None:
        """dA = s dYᵀ (X Bᵀ) and dB = s (dY A)ᵀ X: the pullback of `update`, without G."""
        a, b = (factors[key].to(x.dtype) for key in ("lors_a", "lors_b"))
        grads["lors_a"].add_(grad_y.t() @ (x @ b.t()), alpha=self.scale)
        grads["lors_b"].add_((grad_y @ a).t() @ x, alpha=self.scale)

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """B: the first right singular vectors of G as it is, as in the paper; there of norm 1, here of B's."""
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        b = factors["lors_b"]
        return {**factors, "lors_b": at_norm_of(b, right_vectors(grad, len(b)))}

    def rate(self, run: Run) -> float:
        """The sum of `rank` products is added to every weight."""
        return run.rate_of_product(self.scale, self.rank, run.spread)
