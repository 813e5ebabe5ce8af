"""An adapter method of another package, found by its entry point."""

from dataclasses import dataclass

import torch

from spp_fx.adapters.method import FactorSpec, Method, register
from spp_fx.options import at_least_one, option


@register("grouped")
@dataclass(frozen=True)
class Grouped(Method):
    """W * (1 + gain * tanh(left right)): one number for each row and `width` columns."""

    gain: float = option(1.0, "The largest relative change.")
    width: int = option(4, "Columns that share a number.", at_least_one)

    def factors(self, shape):
        *stack, m, n = shape
        return {
            "left": FactorSpec((*stack, m, 2), "zeros", rows=1),
            "right": FactorSpec((*stack, 2, n // self.width), "kaiming", columns=self.width),
        }

    def refusal(self, shape):
        return f"width {self.width} does not divide its inputs" if shape[-1] % self.width else None

    def update(self, weight, left, right):
        groups = weight.shape[-1] // right.shape[-1]
        return weight * self.gain * torch.tanh(left @ right).repeat_interleave(groups, dim=-1)
