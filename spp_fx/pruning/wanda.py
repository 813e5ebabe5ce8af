"""wanda: keep the entries whose weight times the norm of its input is largest, within each row."""

from torch import Tensor

from spp_fx.pruning.select import keep
from spp_fx.sparsity import Pattern


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2 in float32 (Sun et al., 2024, Eq. 1).

    Args:
        weight: (out, in).
        norms: (in,), of each input over the calibration data; a common factor does not matter.
    """
    return weight.abs().float() * norms.float()


def wanda_mask(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """(out, in) bool, true where wanda keeps; unstructured patterns drop int(p * in) of every row."""
    return keep(wanda_score(weight, norms), pattern, by_row=True)
