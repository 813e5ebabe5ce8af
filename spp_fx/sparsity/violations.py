"""Does a mask hold its pattern, and where is the first place that it does not?"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

from spp_fx.errors import PatternError
from spp_fx.parallel import thread_count
from spp_fx.sparsity._backend import backend
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import NM, Pattern, Unstructured

_BLOCK_BYTES = 1 << 20  # of mask a task


class Group(NamedTuple):
    """One group of an N:M pattern: columns [col_start, col_end) of a row, expert * out + row for 3-D."""

    row: int
    col_start: int
    col_end: int
    nonzeros: int


@dataclass(frozen=True)
class Violations:
    """How a mask breaks a pattern.

    Attributes:
        count: N:M groups with too many non-zeros; for an unstructured pattern, the zeros that are missing.
        first: the first such group in row-major order; None where nothing is wrong or no place is at fault.
    """

    count: int
    first: Group | None

    def describe(self, pattern: Pattern) -> str:
        """What is wrong, for an error message; "holds 2:4" when nothing is."""
        if self.count == 0:
            return f"holds {pattern}"
        if self.first is None or isinstance(pattern, Unstructured):
            return f"{self.count} zeros are missing for {pattern}"
        row, start, end, nonzeros = self.first
        more = f" ({self.count} groups in all)" if self.count > 1 else ""
        return (
            f"row {row}, columns {start}-{end - 1} hold {nonzeros} non-zeros, "
            f"{pattern} allows {pattern.kept}{more}"
        )


def scan_bits(mask: PackedMask, pattern: Pattern) -> Violations:
    """Check a mask against a pattern.

    N:M looks at every group of M consecutive columns. An unstructured share s asks for
    `rows * floor(s * in)` zeros in all, which per-row and whole-matrix pruners both give.

    Raises:
        PatternError: the input dimension is not a multiple of M, so the pattern is not defined.
    """
    if isinstance(pattern, Unstructured):
        wanted = mask.rows * floor(pattern.share * mask.columns)
        return Violations(max(0, wanted - (mask.numel - mask.nnz)), None)
    require_divisible(mask, pattern)
    count, first = 0, None
    for start, found in _count_blocks(mask, pattern):
        if found and first is None:
            first = _first_group(mask, pattern, start)
        count += found
    return Violations(count, first)


def require_divisible(mask: PackedMask, pattern: NM) -> None:
    """Refuse an input dimension that does not split into whole groups (PatternError)."""
    if mask.columns % pattern.group:
        raise PatternError(
            f"{pattern} needs an input dimension that is a multiple of {pattern.group}, "
            f"shape {mask.shape} has {mask.columns}; exclude the site with --targets"
        )


def _count_blocks(mask: PackedMask, pattern: NM) -> Iterator[tuple[int, int]]:
    """(first group, violations) of each block, in order. A block starts on a byte: 8 groups are M bytes."""
    groups = mask.numel // pattern.group
    step = 8 * (_BLOCK_BYTES // pattern.group)
    starts = range(0, groups, step)

    def count(start: int) -> tuple[int, int]:
        bits = mask.bits[start * pattern.group // 8 :]
        return start, backend().count_over(bits, min(step, groups - start), pattern.group, pattern.kept)

    if len(starts) <= 1:
        yield from map(count, starts)
        return
    with ThreadPoolExecutor(min(len(starts), thread_count())) as pool:
        yield from pool.map(count, starts)


def _first_group(mask: PackedMask, pattern: NM, start: int) -> Group:
    """The first violation at or after group `start` (which begins on a byte); there must be one."""
    bits = mask.bits[start * pattern.group // 8 :]
    groups = mask.numel // pattern.group - start
    index = start + backend().first_over(bits, groups, pattern.group, pattern.kept)
    per_row = mask.columns // pattern.group
    row, column = index // per_row, index % per_row * pattern.group
    return Group(row, column, column + pattern.group, _ones(mask, index * pattern.group, pattern.group))


def _ones(mask: PackedMask, position: int, count: int) -> int:
    first, last = position // 8, (position + count + 7) // 8
    window = int.from_bytes(mask.bits[first:last].tobytes(), "little") >> (position - 8 * first)
    return (window & ((1 << count) - 1)).bit_count()
