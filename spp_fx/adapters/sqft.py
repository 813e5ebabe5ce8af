"""SQFT: a low-rank update whose entries are kept where the weight is non-zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spp_fx.adapters.low_rank import LowRankMethod
from spp_fx.adapters.method import DROPOUT_OPTION, SCALE_OPTION, register
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("sqft")
@dataclass(frozen=True)
class SQFT(LowRankMethod):
    """W + s (B A) * (W != 0) — SQFT, EMNLP 2024 findings; defaults are the paper's: s = alpha / r = 64 / 32."""

    left, right = "sqft_b", "sqft_a"
    multiplier = pulled_back = "mask"
    masked_gradient = True

    rank: int = option(32, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)
    dropout: float = option(0.1, *DROPOUT_OPTION)

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return self.scale * (factors["sqft_b"] @ factors["sqft_a"]) * (weight != 0)
