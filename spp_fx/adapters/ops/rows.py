"""Where a kernel takes the rows of a frozen weight from: a dense matrix, or one kept packed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of one row block by device: every temporary of the size of W is at most this large."""


class Rows(Protocol):
    """A frozen weight (m, n) that gives out ranges of rows."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, start: int, stop: int) -> Tensor:
        """Rows start..stop as (stop - start, n) in `dtype`; not to be written to."""
        ...


@dataclass(frozen=True)
class DenseRows:
    """Rows of a dense matrix, as views."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def take(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


def dense_rows(weight: Tensor, shape: tuple[int, int]) -> DenseRows:
    """The rows of an op whose weight is one dense tensor."""
    return DenseRows(weight)


def row_blocks(m: int, n: int, height: int, elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges of an (m, n) weight of at most `elements` elements (but at least one row).

    Each is a whole number of the `height`-row blocks that share a row of alpha, or lies within one.
    """
    yield from split(0, m, n, height, elements)


def split(start: int, stop: int, n: int, height: int, elements: int) -> Iterator[tuple[int, int]]:
    """Rows start..stop, themselves such a range, in ranges of the same kind."""
    most = max(1, elements // max(1, n))
    step = most // height * height
    if step:
        yield from ((first, min(first + step, stop)) for first in range(start, stop, step))
        return
    while start < stop:
        last = min(start + most, stop, (start // height + 1) * height)
        yield start, last
        start = last
