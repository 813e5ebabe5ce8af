"""ria: relative importance of a weight among its row and its column, times a power of its input's norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.options import option
from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.select import row_blocks
from spp_fx.pruning.statistics import Inputs

POWER = 0.5


@register("ria")
@dataclass(frozen=True)
class Ria(Criterion):
    """(|W_ij| / colsum |W| + |W_ij| / rowsum |W|) * ||x_j||^0.5 in float32 (Zhang et al., 2024).

    A row or column without any weight has no importance. Unstructured patterns drop a share of the whole matrix.
    """

    permute: bool = option(
        False, "reorder inputs over the groups of N:M where the preceding weights can be reordered"
    )

    @property
    def reorders(self) -> bool:
        return self.permute

    def score(self, weight: Tensor, inputs: Inputs) -> Tensor:
        columns = torch.zeros_like(inputs.norms)
        for (part,) in row_blocks(weight):
            columns += part.abs().float().sum(0)
        columns.masked_fill_(columns == 0, 1)
        factor = inputs.norms**POWER
        score = torch.empty(weight.shape, device=weight.device)
        for part, out in row_blocks(weight, score):
            size = part.abs().float()
            rows = size.sum(1, keepdim=True)
            out.copy_((size / columns + size / rows.masked_fill(rows == 0, 1)) * factor)
        return score
