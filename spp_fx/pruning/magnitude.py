"""magnitude: keep the entries of largest absolute value."""

from torch import Tensor

from spp_fx.pruning.select import keep
from spp_fx.sparsity import Pattern


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
