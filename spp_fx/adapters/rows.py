"""Rows of a frozen weight, dense or packed as in `sparsity.packing`, and row ranges and buffers for kernels.

In bfloat16 a packed 2:4 weight takes 0.5625 of its dense bytes. Rows are unpacked tile by tile, where a kernel asks
for them, so the dense weight never exists as a whole.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spp_fx.sparsity.packing import pack_2_4, pack_bitmask, unpack_bitmask, unpack_rows

_LOCAL = threading.local()


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


@dataclass(frozen=True)
class PackedRows2of4:
    """Rows of a 2:4 weight: values (m, n/2) and positions (m, ceil(n/8))."""

    values: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def take(self, start: int, stop: int) -> Tensor:
        out = self.values.new_empty(stop - start, self.shape[1])
        unpack_rows(self.values[start:stop], self.positions[start:stop], out, check=False)
        return out

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        packed = pack_2_4(weight, clear=True)
        return {"values": packed.values, "positions": packed.positions}


@dataclass(frozen=True)
class PackedRowsBitmask:
    """Rows of any weight: values (nnz,), bits (m, ceil(n/8)), offsets (m + 1,) int64 of each row's values."""

    values: Tensor
    bits: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def take(self, start: int, stop: int) -> Tensor:
        first, last = self.offsets[[start, stop]].tolist()
        out = self.values.new_empty(stop - start, self.shape[1])
        unpack_bitmask(self.values[first:last], self.bits[start:stop], out)
        return out

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("values", "bits", "offsets"), pack_bitmask(weight), strict=True))


@dataclass(frozen=True)
class Storage:
    """A way to keep a frozen weight (m, n).

    Attributes:
        tensors: names of the tensors, in the order of an op's arguments.
        pack: a weight to its tensors by name.
        rows: the tensors and the shape (m, n) to rows.
        by_row: index of a tensor that has m rows.
    """

    tensors: tuple[str, ...]
    pack: Callable[[Tensor], Mapping[str, Tensor]]
    rows: Callable[..., Rows]
    by_row: int


DENSE = Storage(("weight",), lambda weight: {"weight": weight}, lambda weight, shape: DenseRows(weight), 0)
PACKINGS = {
    "2:4": Storage(("values", "positions"), PackedRows2of4.pack, PackedRows2of4, 1),
    "bitmask": Storage(("values", "bits", "offsets"), PackedRowsBitmask.pack, PackedRowsBitmask, 1),
}


def choose_packing(weight: Tensor) -> str:
    """`2:4` where the weight (m, n) holds that pattern, else `bitmask`."""
    m, n = weight.shape
    if n % 4 == 0 and bool(((weight.reshape(m, n // 4, 4) != 0).sum(2) <= 2).all()):
        return "2:4"
    return "bitmask"


def row_ranges(start: int, stop: int, n: int, group: int, elements: int) -> Iterator[tuple[int, int]]:
    """Rows start..stop of a weight with n columns, in ranges of at most `elements` elements (but at least one row).

    Each is a whole number of `group`-row blocks or lies within one, as rows start..stop must be themselves.
    """
    most = max(1, elements // max(1, n))
    step = most // group * group
    if step:
        yield from ((first, min(first + step, stop)) for first in range(start, stop, step))
        return
    while start < stop:
        last = min(start + most, stop, (start // group + 1) * group)
        yield start, last
        start = last


def workspace(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) matrix with arbitrary content.

    On the CPU it is the thread's own buffer of that name, which the next call with the name hands out again:
    nothing of it may outlive the kernel that asked. It is as large as the largest that was asked for, so
    bounded as that is. A fresh one would come as untouched pages, and touching them costs as much as a pass over W.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    size = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_LOCAL, name, None)
    if held is None or held.numel() < size:
        # Made in inference mode, it could never be written to outside of it.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        setattr(_LOCAL, name, held)
    return held[:size].view(dtype).view(rows, columns)
