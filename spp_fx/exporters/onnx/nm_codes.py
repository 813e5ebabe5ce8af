"""N:M weights as values and codes: which N of M positions are kept is one of few choices, so it is numbered.

A group of M entries that keeps N has C(M, N) choices (6 for 2:4, 70 for 4:8, 12,870 for 8:16). Where several
groups' choices fit one byte they share it: a code stands for a run of groups. Its table row lists the kept
positions in the run, ascending. Groups with fewer entries keep zeros in the first free positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from spp_fx.errors import PatternError
from spp_fx.sparsity.pattern import NM

MAX_GROUP = 16
_CHUNK = 1 << 20  # entries worked on at a time

Bits = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class NMCode:
    """How the kept positions of N:M groups are numbered.

    Attributes:
        pattern: N:M with M <= 16.
        groups: groups that one code stands for.
    """

    pattern: NM
    groups: int

    @property
    def entries(self) -> int:
        """Entries of the dense weight that one code stands for."""
        return self.groups * self.pattern.group

    @property
    def kept(self) -> int:
        """Values that belong to one code."""
        return self.groups * self.pattern.kept

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a code: uint8 or uint16."""
        choices = math.comb(self.pattern.group, self.pattern.kept) ** self.groups
        return np.dtype(np.uint8 if choices <= 256 else np.uint16)

    @cached_property
    def table(self) -> npt.NDArray[np.int32]:
        """(codes, kept) int32: the kept positions in a run, ascending."""
        one = list(combinations(range(self.pattern.group), self.pattern.kept))
        choices = np.array(one, dtype=np.int32)
        table = choices
        for group in range(1, self.groups):
            # The first group's choice is the lowest digit of the code.
            offset = choices + group * self.pattern.group
            low = np.tile(table, (len(choices), 1))
            high = np.repeat(offset, len(table), axis=0)
            table = np.concatenate([low, high], axis=1)
        return table


def code_for(pattern: NM, entries: int) -> NMCode:
    """The shortest code for a weight of `entries` elements in whole groups; M must be at most 16."""
    choices = math.comb(pattern.group, pattern.kept)
    groups = 1
    while choices ** (2 * groups) <= 256 and entries % (2 * groups * pattern.group) == 0:
        groups *= 2
    return NMCode(pattern, groups)


def encode(code: NMCode, weight: Bits, sign: int) -> tuple[Bits, Bits, int]:
    """Take a weight apart.

    Args:
        code: its numbering.
        weight: the elements as unsigned integers of their width, flat, whole groups.
        sign: the bit of the sign, 0 for integers: a zero of negative sign is kept where a position is free.

    Returns:
        Values (runs, kept) of weight's dtype, codes (runs,), and how many negative zeros became +0.

    Raises:
        PatternError: a group keeps more than N; names its first element's index.
    """
    group, kept = code.pattern.group, code.pattern.kept
    runs = weight.size // code.entries
    values = np.empty((runs, code.groups, kept), dtype=weight.dtype)
    codes = np.empty(runs, dtype=code.dtype)
    choices, ranks = _tables(group, kept)
    cleared = 0
    for start, stop in _chunks(runs, code.entries):
        part = weight[start * code.entries : stop * code.entries].reshape(-1, group)
        held = _mask(part != 0)
        over = np.flatnonzero(np.bitwise_count(held) > kept)
        if over.size:
            part = part.copy()
            negative = part[over] == sign
            cleared += int(negative.sum()) if sign else 0
            part[over] = np.where(negative & (sign != 0), 0, part[over])
            held[over] = _mask(part[over] != 0)
            worst = over[np.bitwise_count(held[over]) > kept]
            if worst.size:
                first = start * code.entries + int(worst[0]) * group
                raise PatternError(
                    f"the {group} elements from {first} on keep {int(np.bitwise_count(held[worst[0]]))}, "
                    f"{code.pattern} allows {kept}"
                )
        rank = ranks[held]
        values[start:stop] = np.take_along_axis(part, choices[rank], axis=1).reshape(-1, code.groups, kept)
        digits = rank.reshape(-1, code.groups).astype(np.int64)
        codes[start:stop] = (digits * len(choices) ** np.arange(code.groups)).sum(axis=1)
    return values.reshape(runs, code.kept), codes, cleared


def _chunks(runs: int, entries: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // entries)
    for start in range(0, runs, step):
        yield start, min(runs, start + step)


def _mask(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """Kept positions (groups, M) as one integer a group, the first position in the lowest bit."""
    mask = np.zeros(len(kept), dtype=np.uint16)
    for position in range(kept.shape[1]):
        mask |= kept[:, position].astype(np.uint16) << np.uint16(position)
    return mask


@lru_cache(maxsize=8)
def _tables(group: int, kept: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Choices (C(M, N), N), and the number of the choice that holds each mask (2^M,)."""
    choices = np.array(list(combinations(range(group), kept)), dtype=np.int64)
    number = np.zeros(1 << group, dtype=np.uint16)
    number[(1 << choices).sum(axis=1)] = np.arange(len(choices))
    masks = np.arange(1 << group, dtype=np.uint32)
    for _ in range(kept):  # one more position for every mask that is short of some: the lowest free one
        short = np.bitwise_count(masks) < kept
        masks = np.where(short, masks | (masks + 1), masks)
    masks = np.where(np.bitwise_count(masks) == kept, masks, 0)
    return choices, number[masks & ((1 << group) - 1)]
