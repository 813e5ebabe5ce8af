"""magnitude: keep the entries of largest absolute value."""

from dataclasses import dataclass

from torch import Tensor

from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.statistics import Inputs


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """|W_ij|, of the weight alone; unstructured patterns drop int(p * size) of the whole matrix."""

    calibrated = False

    def score(self, weight: Tensor, inputs: Inputs) -> Tensor:
        return weight.abs()
