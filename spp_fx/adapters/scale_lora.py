"""ScaleLoRA: a low-rank matrix of multipliers that starts as all ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
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


@register("scale-lora")
@dataclass(frozen=True)
class ScaleLoRA(Method):
    """W * (B A), B A from all ones — ScaleLoRA of PERP, 2023.

    Column 0 of B and row 0 of A start as ones, the other columns of B as zeros: B A is exactly 1, while the other
    rows of A, which start at random, let all r components learn.
    """

    masked_gradient: ClassVar[bool] = True

    rank: int = option(16, "Rank r of the multipliers.", at_least_one)
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "scale_lora_a": FactorSpec((*stack, self.rank, n), "kaiming", columns=1, ones="row"),
            "scale_lora_b": FactorSpec((*stack, m, self.rank), "zeros", rows=1, ones="column"),
        }

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return weight * (factors["scale_lora_b"] @ factors["scale_lora_a"] - 1)

    def kernels(self, device: str) -> Kernels | None:
        return self._low_rank()

    def fold_kernel(self, factors: Mapping[str, Any], dtype: str) -> FoldKernel | None:
        return self._low_rank().fold_kernel(factors, dtype)

    def _low_rank(self) -> LowRank:
        from spp_fx.adapters.low_rank import LowRank

        return LowRank(
            "scale_lora_b", "scale_lora_a", 1.0, multiplier="weight", pulled_back="weight", offset=-1.0
        )

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """The rows of A after the first, which is ones: the first right singular vectors of W * G."""
        import torch

        from spp_fx.adapters.directions import at_norm_of, right_vectors

        ones, others = factors["scale_lora_a"].split([1, self.rank - 1])
        if self.rank > 1:
            others = at_norm_of(others, right_vectors(weight * grad, self.rank - 1))
        return {**factors, "scale_lora_a": torch.cat([ones, others])}

    def rate(self, run: Run) -> float:
        """Row and column of ones: every weight is multiplied by a sum of what moves by the rate."""
        return run.rate_of_sum()
