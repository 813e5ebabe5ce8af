"""wanda: keep the entries whose weight times the norm of its input is largest, within each row."""

from dataclasses import dataclass

from torch import Tensor

from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.statistics import Inputs


@register("wanda")
@dataclass(frozen=True)
class Wanda(Criterion):
    """|W_ij| * ||x_j||_2 in float32 (Sun et al., 2024, Eq. 1); unstructured patterns drop int(p * in) of every row."""

    by_row = True

    def score(self, weight: Tensor, inputs: Inputs) -> Tensor:
        return weight.abs().float() * inputs.norms
