"""Which pattern does a mask hold?"""

from fractions import Fraction

from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import NM, Pattern, Unstructured
from spp_fx.sparsity.violations import scan_bits

_GROUPS = (4, 8, 16, 2)  # in order of preference at equal density: 2:4 is what hardware asks for, 1:2 is not
_CLOSE = Fraction(3, 4)
_LEAST_PERCENT = 5


def detect_pattern(mask: PackedMask) -> Pattern | None:
    """The tightest pattern the mask holds, or None for a dense weight.

    N:M (M of 4, 8, 16, then 2) where every group holds it and the weight is at least 3/4 as dense as it
    allows, since any sparse enough weight satisfies some N:M by chance; the lowest N/M wins, at equal
    N/M the smaller M, 2 last. Otherwise the share of zeros rounded down to a whole percent, from 5 % up.
    """
    if mask.numel == 0:
        return None
    found = [nm for group in _GROUPS if (nm := _tightest(mask, group)) is not None]
    best = min(found, key=lambda nm: Fraction(nm.kept, nm.group), default=None)
    if best is not None and mask.nnz >= _CLOSE * Fraction(best.kept, best.group) * mask.numel:
        return best
    percent = 100 * (mask.numel - mask.nnz) // mask.numel
    return Unstructured(Fraction(percent, 100)) if percent >= _LEAST_PERCENT else None


def _tightest(mask: PackedMask, group: int) -> NM | None:
    """The smallest N such that the mask is N:group, by bisection; None where only N = group would do."""
    if mask.columns % group:
        return None
    low, high = 1, group
    while low < high:
        middle = (low + high) // 2
        if scan_bits(mask, NM(middle, group)).count == 0:
            high = middle
        else:
            low = middle + 1
    return NM(low, group) if low < group else None
