"""LoRA*: plain LoRA while training, and the mask applied when it is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
    SCALE_OPTION,
    Factors,
    FactorSpec,
    Kernels,
    Method,
    Run,
    register,
)
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("lora-star")
@dataclass(frozen=True)
class LoRAStar(Method):
    """W + s B A, dense until merge applies the mask of W — the baseline LoRA* of SPP, ICML 2024.

    What it learns where W is zero is lost; `merge` says how much that is.
    """

    masked: ClassVar[bool] = False

    rank: int = option(16, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)
    dropout: float = option(0.05, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "lora_star_a": FactorSpec((*stack, self.rank, n), "kaiming", columns=1),
            "lora_star_b": FactorSpec((*stack, m, self.rank), "zeros", rows=1),
        }

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return self.scale * (factors["lora_star_b"] @ factors["lora_star_a"])

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """A: the first right singular vectors of G as it is, since the update is dense."""
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        a = factors["lora_star_a"]
        return {**factors, "lora_star_a": at_norm_of(a, right_vectors(grad, len(a)))}

    def rate(self, run: Run) -> float:
        """The sum of `rank` products is added to every weight."""
        return run.rate_of_product(self.scale, self.rank, run.spread)

    def kernels(self, device: str) -> Kernels | None:
        from spp_fx.adapters.low_rank import LowRank

        return LowRank("lora_star_b", "lora_star_a", self.scale, multiplier="one", pulled_back="one")

    def factor_grads(  # pyright: ignore[reportIncompatibleVariableOverride] - a function is a class variable
        self, x: Tensor, grad_y: Tensor, weight: Tensor, factors: Factors, grads: dict[str, Tensor]
    ) -> None:
        """dB = s dYᵀ (X Aᵀ) and dA = s (dY B)ᵀ X, without G."""
        a, b = (factors[key].to(x.dtype) for key in ("lora_star_a", "lora_star_b"))
        grads["lora_star_b"].add_(grad_y.t() @ (x @ a.t()), alpha=self.scale)
        grads["lora_star_a"].add_((grad_y @ b).t() @ x, alpha=self.scale)
