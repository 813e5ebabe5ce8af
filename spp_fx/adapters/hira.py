"""HiRA: a low-rank matrix that multiplies the weight, so that the update has the weight's own zeros."""

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


@register("hira")
@dataclass(frozen=True)
class HiRA(Method):
    """W * (1 + s B A) — HiRA, ICLR 2025; its rank 32, and s = 1 as there."""

    masked_gradient: ClassVar[bool] = True

    rank: int = option(32, "Rank r of the multiplier.", at_least_one)
    scale: float = option(1.0, *SCALE_OPTION)
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "hira_a": FactorSpec((*stack, self.rank, n), "kaiming", columns=1),
            "hira_b": FactorSpec((*stack, m, self.rank), "zeros", rows=1),
        }

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return weight * (self.scale * (factors["hira_b"] @ factors["hira_a"]))

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """A: the first right singular vectors of W * G, the gradient with respect to s B A."""
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        a = factors["hira_a"]
        return {**factors, "hira_a": at_norm_of(a, right_vectors(weight * grad, len(a)))}

    def rate(self, run: Run) -> float:
        """Every weight is multiplied by the sum of `rank` products."""
        return run.rate_of_product(self.scale, self.rank)

    def kernels(self, device: str) -> Kernels | None:
        return self._low_rank()

    def fold_kernel(self, factors: Mapping[str, Any], dtype: str) -> FoldKernel | None:
        return self._low_rank().fold_kernel(factors, dtype)

    def _low_rank(self) -> LowRank:
        from spp_fx.adapters.low_rank import LowRank

        return LowRank("hira_b", "hira_a", self.scale, multiplier="weight", pulled_back="weight")
