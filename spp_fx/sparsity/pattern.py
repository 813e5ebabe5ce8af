"""Sparsity patterns, the check of a mask against one, and the detection of a mask's pattern.

`2:4` keeps at most two of every four consecutive weights along the input dimension; `62.5%` is only a share of
zeros. N counts the KEPT weights, as in the documentation of the hardware.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor

import numpy as np

from spp_fx.errors import PatternError, UsageError
from spp_fx.parallel import in_order, thread_count
from spp_fx.sparsity.kernels import count_over, first_over
from spp_fx.sparsity.mask import PackedMask

MAX_GROUP = 64
_BLOCK_BYTES = 1 << 20  # of mask that a thread counts at once
_PERCENT_DIGITS = 6

_NM = re.compile(r"([0-9]{1,4}):([0-9]{1,4})", re.ASCII)
_PERCENT = re.compile(rf"([0-9]{{1,4}}(?:\.[0-9]{{1,{_PERCENT_DIGITS}}})?)%", re.ASCII)
_HINT = "write N:M for at most N kept of every M along the input (2:4, 4:8), or a share of zeros (50%)"


@dataclass(frozen=True)
class NM:
    """At most `kept` non-zeros in every `group` consecutive weights of a row; 1 <= kept < group <= 64.

    Raises:
        UsageError: the numbers are out of range.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 2 <= self.group <= MAX_GROUP:
            raise UsageError(f"pattern {self}: the group M must be between 2 and {MAX_GROUP}; {_HINT}")
        if self.kept < 1:
            raise UsageError(f"pattern {self}: N counts the kept weights and must be at least 1; {_HINT}")
        if self.kept >= self.group:
            raise UsageError(f"pattern {self} keeps every weight: N must be smaller than M; {_HINT}")

    @property
    def sparsity(self) -> float:
        """Share of zeros the pattern guarantees."""
        return 1.0 - self.kept / self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True)
class Unstructured:
    """At least `share` of the weights are zero, anywhere; exact, 0 < share <= 1, to 1e-6 of a percent.

    Raises:
        UsageError: the share is out of range or has more digits than its print keeps.
    """

    share: Fraction

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"a share of zeros of {float(self.share):.6%} is not in (0%, 100%]; {_HINT}")
        if (self.share * 100 * 10**_PERCENT_DIGITS).denominator != 1:
            raise UsageError(f"a share of zeros is written to at most {_PERCENT_DIGITS} digits of a percent")

    @property
    def sparsity(self) -> float:
        """Share of zeros the pattern guarantees."""
        return float(self.share)

    def __str__(self) -> str:
        percent = 100 * self.share
        return f"{(Decimal(percent.numerator) / percent.denominator).normalize():f}%"


Pattern = NM | Unstructured


def implies(known: Pattern | None, wanted: NM) -> bool:
    """Whether every weight that holds `known` also holds `wanted`, as 1:2 and 2:8 imply 4:8."""
    if not isinstance(known, NM) or wanted.group % known.group:
        return False
    return known.kept * (wanted.group // known.group) <= wanted.kept


def parse_pattern(text: str) -> Pattern:
    """Read `N:M` or a percentage; the inverse of str().

    Raises:
        UsageError: the text is neither, with what would work.
    """
    stripped = text.strip()
    if match := _NM.fullmatch(stripped):
        return NM(int(match[1]), int(match[2]))
    if match := _PERCENT.fullmatch(stripped):
        return Unstructured(Fraction(Decimal(match[1])) / 100)
    raise UsageError(f"{text[:40]!r} is not a sparsity pattern: {_HINT}")


@dataclass(frozen=True)
class Violations:
    """How a mask breaks a pattern.

    Attributes:
        count: N:M groups with too many non-zeros; for an unstructured pattern, the zeros that are missing.
        position: 'row 17, columns 64-67' of the first such group in row-major order, after 'expert 2, ' for a
            stack; None where the mask holds the pattern or the pattern is unstructured.
        nonzeros: of that group.
    """

    count: int
    position: str | None = None
    nonzeros: int = 0

    def describe(self, pattern: Pattern) -> str:
        """What is wrong, for an error message; "holds 2:4" when nothing is."""
        if self.count == 0:
            return f"holds {pattern}"
        if isinstance(pattern, Unstructured):
            return f"{self.count} zeros are missing for {pattern}"
        more = f" ({self.count} groups in all)" if self.count > 1 else ""
        return f"{self.position} hold {self.nonzeros} non-zeros, {pattern} allows {pattern.kept}{more}"


def scan_bits(mask: PackedMask, pattern: Pattern) -> Violations:
    """Check a mask against a pattern.

    N:M looks at every group of M consecutive columns. An unstructured share s asks for
    `rows * floor(s * in)` zeros in all, which per-row and whole-matrix pruners both give.

    Raises:
        PatternError: the input dimension is not a multiple of M, so the pattern is not defined.
    """
    if isinstance(pattern, Unstructured):
        wanted = mask.rows * floor(pattern.share * mask.columns)
        return Violations(max(0, wanted - (mask.numel - mask.nnz)))
    if mask.columns % pattern.group:
        raise PatternError(
            f"{pattern} needs an input dimension that is a multiple of {pattern.group}, "
            f"shape {mask.shape} has {mask.columns}; exclude the site with --targets"
        )
    groups = mask.numel // pattern.group
    step = 8 * (_BLOCK_BYTES // pattern.group)  # a block starts on a byte: 8 groups are M bytes
    starts = range(0, groups, step)

    def count(start: int) -> int:
        bits = mask.bits[start * pattern.group // 8 :]
        return count_over(bits, min(step, groups - start), pattern.group, pattern.kept)

    counts = list(in_order(count, starts, min(len(starts), thread_count())))
    if not any(counts):
        return Violations(0)
    block = next(start for start, found in zip(starts, counts, strict=True) if found)
    return Violations(sum(counts), *_first_group(mask, pattern, block))


def _first_group(mask: PackedMask, pattern: NM, start: int) -> tuple[str, int]:
    """Position and non-zeros of the first violation at or after group `start`, which begins on a byte."""
    size = pattern.group
    bits = mask.bits[start * size // 8 :]
    index = size * (start + first_over(bits, mask.numel // size - start, size, pattern.kept))
    spread = np.unpackbits(mask.bits[index // 8 : (index + size + 7) // 8], bitorder="little")
    row, column = divmod(index, mask.columns)
    position = f"{mask.row_name(row)}, columns {column}-{column + size - 1}"
    return position, int(spread[index % 8 : index % 8 + size].sum())


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
    """The smallest N such that the mask is N:group; None where only N = group would do."""
    if mask.columns % group:
        return None
    holds = bisect_left(range(1, group), True, key=lambda n: scan_bits(mask, NM(n, group)).count == 0)
    return NM(holds + 1, group) if holds + 1 < group else None
