"""magnitude: keep the entries of largest absolute value."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.select import keep
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import Pattern


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """Looks at the weight alone."""

    name: ClassVar[str]
    calibrated = False

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, None]:
        return magnitude_mask(weight, pattern), None


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Which entries of a weight magnitude pruning keeps.

    N:M keeps the N largest |w| of every M consecutive inputs; unstructured drops the int(p * size)
    smallest of the whole matrix. Exactly so many: ties go to the entry that comes first.

    Args:
        weight: (out, in), any floating dtype.

    Returns:
        (out, in) bool, true where the entry is kept. An entry that is zero already may count as kept.

    Raises:
        PatternError: in is no multiple of M.
    """
    return keep(weight, pattern, by_row=False)
