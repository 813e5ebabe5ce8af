"""What folding a weight met, and what it may do with values that vanish."""

from dataclasses import dataclass
from typing import Literal

Vanish = Literal["keep", "error", "allow"]


@dataclass
class FoldCounts:
    """What folding one weight met.

    Attributes:
        vanished: non-zeros whose folded value rounds to zero (kept or not, by the policy).
        changed: elements whose stored value changed.
    """

    vanished: int = 0
    changed: int = 0

    def add(self, other: "FoldCounts") -> None:
        self.vanished += other.vanished
        self.changed += other.changed
