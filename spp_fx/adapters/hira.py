"""HiRA: a low-rank matrix that multiplies the weight, so that the update has the weight's own zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spp_fx.adapters.low_rank import LowRankMethod
from spp_fx.adapters.method import DROPOUT_OPTION, SCALE_OPTION, register
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("hira")
@dataclass(frozen=True)
class HiRA(LowRankMethod):
    """W * (1 + s B A) — HiRA, ICLR 2025; its rank 32, and s = 1 as there."""

    left, right = "hira_b", "hira_a"
    multiplier = pulled_back = "weight"
    masked_gradient = True

    rank: int = option(32, "Rank r of the multiplier.", at_least_one)
    scale: float = option(1.0, *SCALE_OPTION)
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return weight * (self.scale * (factors["hira_b"] @ factors["hira_a"]))
