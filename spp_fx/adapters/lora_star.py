"""LoRA*: plain LoRA while training, and the mask applied when it is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spp_fx.adapters.low_rank import LowRankMethod
from spp_fx.adapters.method import DROPOUT_OPTION, SCALE_OPTION, register
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor


@register("lora-star")
@dataclass(frozen=True)
class LoRAStar(LowRankMethod):
    """W + s B A, dense until merge applies the mask of W — the baseline LoRA* of SPP, ICML 2024.

    What it learns where W is zero is lost; `merge` says how much that is.
    """

    left, right = "lora_star_b", "lora_star_a"
    multiplier = pulled_back = "one"
    masked = False
    factor_grads = LowRankMethod.product_grads

    rank: int = option(16, "Rank r of the update.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)
    dropout: float = option(0.05, *DROPOUT_OPTION)

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return self.scale * (factors["lora_star_b"] @ factors["lora_star_a"])
