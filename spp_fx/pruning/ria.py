"""ria: relative importance of a weight among its row and its column, times a power of its input's norm."""

from torch import Tensor

from spp_fx.pruning.select import keep
from spp_fx.sparsity import Pattern

POWER = 0.5


def ria_score(weight: Tensor, norms: Tensor) -> Tensor:
    """(|W| / colsum |W| + |W| / rowsum |W|) * ||x_j||^0.5 in float32 (Zhang et al., 2024).

    A row or column without any weight has no importance.

    Args:
        weight: (out, in).
        norms: (in,), of each input over the calibration data.
    """
    size = weight.abs().float()
    columns, rows = size.sum(0, keepdim=True), size.sum(1, keepdim=True)
    relative = size / columns.masked_fill(columns == 0, 1) + size / rows.masked_fill(rows == 0, 1)
    return relative * norms.float() ** POWER


def ria_mask(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) bool, true where ria keeps; unstructured patterns drop a share of the whole matrix."""
    return keep(ria_score(weight, norms), pattern, by_row=False)
