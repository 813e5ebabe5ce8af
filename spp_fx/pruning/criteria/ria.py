"""ria: relative importance of a weight among its row and its column, times a power of its input's norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.select import keep, row_blocks
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import Pattern

POWER = 0.5


@register("ria")
@dataclass(frozen=True)
class Ria(Criterion):
    """Zhang et al., 2024.

    Args:
        permute: reorder the inputs of a weight, so that those of large score fall into different groups of
            an N:M pattern, wherever the order can be absorbed by the weights that make the inputs.
    """

    name: ClassVar[str]
    permute: bool = False

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, None]:
        return ria_mask(weight, inputs.norms, pattern), None


def ria_score(weight: Tensor, norms: Tensor) -> Tensor:
    """(|W| / colsum |W| + |W| / rowsum |W|) * ||x_j||^0.5 in float32.

    A row or column without any weight has no importance.

    Args:
        weight: (out, in).
        norms: (in,), of each input over the calibration data.
    """
    columns = torch.zeros_like(norms, dtype=torch.float32)
    for (part,) in row_blocks(weight):
        columns += part.abs().float().sum(0)
    columns.masked_fill_(columns == 0, 1)
    factor = norms.float() ** POWER
    score = torch.empty(weight.shape, device=weight.device)
    for part, out in row_blocks(weight, score):
        size = part.abs().float()
        rows = size.sum(1, keepdim=True)
        out.copy_((size / columns + size / rows.masked_fill(rows == 0, 1)) * factor)
    return score


def ria_mask(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) bool, true where ria keeps; unstructured patterns drop a share of the whole matrix."""
    return keep(ria_score(weight, norms), pattern, by_row=False)
