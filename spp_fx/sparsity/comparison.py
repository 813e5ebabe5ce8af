"""Is a mask the one it started as? Against a lock's digest, or against the other mask itself."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import MaskError
from spp_fx.sparsity.locate import flip, locator, propose_flips
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.mask import PackedMask

_BLOCK = 1 << 20

Position = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """A mask held against the lock.

    Attributes:
        equal: the digests are equal.
        lost_zeros: (row, column) that were zero when the lock was made and are not now; row is
            expert * out + row for a stack. Complete where `located`, empty where not.
        new_zeros: the reverse.
        located: the two lists are proven: with exactly these flips undone the digest is the lock's.
            True, with empty lists, for equal masks.
        reason: why the positions could not be named; empty where they are.
    """

    equal: bool
    lost_zeros: list[Position] = field(default_factory=list[Position])
    new_zeros: list[Position] = field(default_factory=list[Position])
    located: bool = True
    reason: str = ""


def compare(entry: LockEntry, mask: PackedMask) -> Comparison:
    """Hold a mask against its lock entry; on a mismatch name the flipped positions if that can be proven."""
    if entry.shape != mask.shape:
        return Comparison(
            False, located=False, reason=f"shape {mask.shape}, the lock has shape {entry.shape}"
        )
    if entry.mask == mask.digest:
        return Comparison(True)
    flips = propose_flips(entry.locator, locator(mask), mask)
    if flips is None or flip(mask, flips).digest != entry.mask:
        change = mask.nnz - entry.nnz
        return Comparison(
            False,
            located=False,
            reason=f"too many positions changed to name them from the lock ({change:+d} non-zeros)",
        )
    lost_zeros, new_zeros = _split(mask, np.asarray(flips, dtype=np.int64))
    return Comparison(False, lost_zeros, new_zeros)


@dataclass(frozen=True)
class MaskDifference:
    """Two masks held against each other, exactly.

    Attributes:
        lost_zeros: how many positions are zero in the first and non-zero in the second.
        new_zeros: how many the other way round.
        first_lost: the first of them as (row, column), in row-major order, at most `limit`.
        first_new: likewise.
    """

    lost_zeros: int
    new_zeros: int
    first_lost: list[Position]
    first_new: list[Position]

    @property
    def equal(self) -> bool:
        return self.lost_zeros == 0 and self.new_zeros == 0


def compare_masks(then: PackedMask, now: PackedMask, limit: int = 10) -> MaskDifference:
    """Count every difference of two masks and name the first `limit` of each direction.

    Raises:
        MaskError: the shapes differ.
    """
    if then.shape != now.shape:
        raise MaskError(f"masks of shapes {then.shape} and {now.shape} cannot be compared")
    lost, new = 0, 0
    first_lost: list[int] = []
    first_new: list[int] = []
    for start in range(0, then.bits.size, _BLOCK):
        before, after = then.bits[start : start + _BLOCK], now.bits[start : start + _BLOCK]
        changed = before ^ after
        if changed.any():
            lost += _note(changed & after, 8 * start, first_lost, limit)
            new += _note(changed & before, 8 * start, first_new, limit)
    return MaskDifference(
        lost, new, [divmod(i, then.columns) for i in first_lost], [divmod(i, then.columns) for i in first_new]
    )


def _note(ones: NDArray[np.uint8], base: int, found: list[int], limit: int) -> int:
    """Count the ones and append their linear indices to `found` until it holds `limit`."""
    room = limit - len(found)
    if room > 0:
        places = np.flatnonzero(ones)[:room]  # every such byte holds at least one
        for place in places.tolist():
            byte = int(ones[place])
            found.extend(base + 8 * place + bit for bit in range(8) if byte >> bit & 1)
        del found[limit:]
    return int(np.bitwise_count(ones).sum(dtype=np.int64))


def _split(mask: PackedMask, indices: NDArray[np.int64]) -> tuple[list[Position], list[Position]]:
    ones = mask.bits[indices // 8] >> (indices % 8).astype(np.uint8) & 1
    lost = [divmod(int(i), mask.columns) for i in indices[ones == 1]]
    new = [divmod(int(i), mask.columns) for i in indices[ones == 0]]
    return lost, new
