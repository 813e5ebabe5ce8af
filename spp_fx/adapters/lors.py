"""LoRS: a masked low-rank update whose gradients leave the mask out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spp_fx.adapters.low_rank import LowRankMethod
from spp_fx.adapters.method import DROPOUT_OPTION, SCALE_OPTION, register
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("lors")
@dataclass(frozen=True)
class LoRS(LowRankMethod):
    """W + s (A B) * (W != 0), differentiated as if the mask were not there — LoRS, 2025, section 3.

    Its code leaves s out of the gradients of A and B; the paper's formulas have it, and so has this. The vectors of
    its gradient start have norm 1 there, and here that of B.
    """

    left, right = "lors_a", "lors_b"
    multiplier, pulled_back = "mask", "one"
    factor_grads = LowRankMethod.product_grads

    rank: int = option(16, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, f"{SCALE_OPTION[0]} LoRS writes it alpha / sqrt(r).", SCALE_OPTION[1])
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        change = self.scale * (factors["lors_a"] @ factors["lors_b"])
        # Forwards exactly `change` or 0, since x - x is 0 and 0 - x is exact; backwards that of `change` alone.
        return change + (change * (weight != 0) - change).detach()
