"""Sparsity patterns: what share of a weight is zero, and where the zeros may lie.

`2:4` keeps at most two of every four consecutive weights along the input dimension; `62.5%` says
only how many zeros there are. N counts the KEPT weights, as in the hardware's own documentation.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from spp_fx.errors import UsageError

MAX_GROUP = 64
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
        scaled = int(self.share * 100 * 10**_PERCENT_DIGITS)
        whole, part = divmod(scaled, 10**_PERCENT_DIGITS)
        digits = f"{part:0{_PERCENT_DIGITS}d}".rstrip("0")
        return f"{whole}.{digits}%" if digits else f"{whole}%"


Pattern = NM | Unstructured


def implies(known: Pattern | None, wanted: NM) -> bool:
    """Whether every weight that holds a pattern holds an N:M pattern too, as 1:2 and 2:8 hold 4:8."""
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
