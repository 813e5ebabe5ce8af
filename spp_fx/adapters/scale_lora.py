"""ScaleLoRA: a low-rank matrix of multipliers that starts as all ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spp_fx.adapters.low_rank import LowRankMethod
from spp_fx.adapters.method import DROPOUT_OPTION, Factors, FactorSpec, Run, register
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("scale-lora")
@dataclass(frozen=True)
class ScaleLoRA(LowRankMethod):
    """W * (B A), B A from all ones — ScaleLoRA of PERP, 2023.

    Column 0 of B and row 0 of A start as ones, the other columns of B as zeros: B A is exactly 1, while the other
    rows of A, which start at random, let all r components learn.
    """

    left, right = "scale_lora_b", "scale_lora_a"
    multiplier = pulled_back = "weight"
    offset = -1.0
    masked_gradient = True

    rank: int = option(16, "Rank r of the multipliers.", at_least_one)
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        a, b = super().factors(shape).values()
        return {self.right: replace(a, ones="row"), self.left: replace(b, ones="column")}

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return weight * (factors["scale_lora_b"] @ factors["scale_lora_a"] - 1)

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """The rows of A after the first, which is ones."""
        import torch

        ones, others = factors[self.right].split([1, self.rank - 1])
        if self.rank > 1:
            others = super().gradient_start(weight, grad, {self.right: others})[self.right]
        return {**factors, self.right: torch.cat([ones, others])}

    def rate(self, run: Run) -> float:
        """Row and column of ones: every weight is multiplied by a sum of what moves by the rate."""
        return run.rate_of_sum()
