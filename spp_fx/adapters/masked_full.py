"""masked-full: every non-zero of the weight trained by itself, the bound of what a fixed mask allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
    Factors,
    FactorSpec,
    Method,
    TrainingDefaults,
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

    def defaults(self, width: float, steps: int | None) -> TrainingDefaults:
        """3e-3 at 128 inputs, which suits the models of docs/methods.md, in proportion to 1 / inputs.

        Adam moves every entry by about the rate, and a change of n entries of one sign grows an output by n of it.
        """
        return TrainingDefaults(lr=3e-3 * 128 / width)
