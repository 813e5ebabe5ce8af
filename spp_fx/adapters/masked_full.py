"""masked-full: every non-zero of the weight trained by itself, the bound of what a fixed mask allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
    Factors,
    FactorSpec,
    Method,
    Run,
    register,
    work_dtype,
)
from spp_fx.options import option

if TYPE_CHECKING:
    from torch import Tensor


@register("masked-full")
@dataclass(frozen=True)
class MaskedFull(Method):
    """W + D * (W != 0) with all of D trained — Eq. 3 of SPP, ICML 2024; as many numbers as W has, in float32."""

    masked_gradient: ClassVar[bool] = True

    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        return {"full_delta": FactorSpec(shape, "zeros", rows=1, columns=1)}

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return factors["full_delta"] * (weight != 0)

    def pullback(self, grad: Tensor, weight: Tensor, factors: Factors, grads: dict[str, Tensor]) -> None:
        """dD = G * (W != 0)."""
        grads["full_delta"] += grad.to(work_dtype(grad)) * (weight != 0)

    def rate(self, run: Run) -> float:
        """Adam moves every weight by about the rate a step."""
        return run.rate_of_sum(run.spread)
