"""SQFT: a low-rank update whose entries are kept where the weight is non-zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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


@register("sqft")
@dataclass(frozen=True)
class SQFT(Method):
    """W + s (B A) * (W != 0) — SQFT, EMNLP 2024 findings; defaults are the paper's: s = alpha / r = 64 / 32."""

    masked_gradient: ClassVar[bool] = True

    rank: int = option(32, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)
    dropout: float = option(0.1, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "sqft_a": FactorSpec((*stack, self.rank, n), "kaiming", columns=1),
            "sqft_b": FactorSpec((*stack, m, self.rank), "zeros", rows=1),
        }

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return self.scale * (factors["sqft_b"] @ factors["sqft_a"]) * (weight != 0)

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """A: the first right singular vectors of G where the weight is not zero."""
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        a = factors["sqft_a"]
        return {**factors, "sqft_a": at_norm_of(a, right_vectors(grad * (weight != 0), len(a)))}

    def rate(self, run: Run) -> float:
        """The sum of `rank` products is added to every weight."""
        return run.rate_of_product(self.scale, self.rank, run.spread)

    def kernels(self, device: str) -> Kernels | None:
        return self._low_rank()

    def fold_kernel(self, factors: Mapping[str, Any], dtype: str) -> FoldKernel | None:
        return self._low_rank().fold_kernel(factors, dtype)

    def _low_rank(self) -> LowRank:
        from spp_fx.adapters.low_rank import LowRank

        return LowRank("sqft_b", "sqft_a", self.scale, multiplier="mask", pulled_back="mask")
