"""wanda: keep the entries whose weight times the norm of its input is largest, within each row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.select import keep, row_blocks
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import Pattern


@register("wanda")
@dataclass(frozen=True)
class Wanda(Criterion):
    """Sun et al., 2024."""

    name: ClassVar[str]

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, None]:
        return wanda_mask(weight, inputs.norms, pattern), None


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 in float32 (Eq. 1).

    Args:
        weight: (out, in).
        norms: (in,), of each input over the calibration data; a common factor does not matter.
    """
    return weight.abs().float() * norms.float()


def wanda_mask(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) bool, true where wanda keeps; unstructured patterns drop int(p * in) of every row."""
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for part, target in row_blocks(weight, mask):
        target.copy_(keep(wanda_score(part, norms), pattern, by_row=True))
    return mask
