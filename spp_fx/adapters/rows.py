"""Rows of a frozen weight, dense or packed, and what kernels take them with: buffers, row ranges, array views.

A 2:4 weight is kept as values and two-bit positions, any other pattern as values and a bit mask; in bfloat16 a 2:4
weight takes 0.5625 of its dense bytes. Rows are laid out where a kernel asks for them, tile by tile, so the dense
weight never exists as a whole.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spp_fx.compiled import optional_module

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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
    """Rows of a 2:4 weight: values (m, n/2), positions (m, ceil(n/8)), see `unpack_2_4`."""

    values: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def take(self, start: int, stop: int) -> Tensor:
        out = self.values.new_empty(stop - start, self.shape[1])
        return unpack_2_4(self.values[start:stop], self.positions[start:stop], out)


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
        return unpack_bitmask(self.values[first:last], self.bits[start:stop], out)


def pack_2_4(weight: Tensor) -> dict[str, Tensor]:
    """A 2:4 weight (m, n) as `values` and `positions`; a group with less than two takes a zero along."""
    m, n = weight.shape
    groups = weight.reshape(m, n // 4, 4)
    # Stable: the non-zeros first, each kind in order of position; then the two chosen in order.
    order = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :2].sort(dim=2).values
    values = groups.gather(2, order).reshape(m, n // 2)
    nibbles = (order[:, :, 0] | order[:, :, 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.cat((nibbles, nibbles.new_zeros(m, 1)), dim=1)
    return {
        "values": values.contiguous(),
        "positions": (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous(),
    }


def pack_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """Any weight (m, n) as `values`, `bits` and `offsets`."""
    m, n = weight.shape
    kept = weight != 0
    padded = torch.zeros(m, -(-n // 8) * 8, dtype=torch.uint8, device=weight.device)
    padded[:, :n] = kept
    powers = (2 ** torch.arange(8, device=weight.device)).to(torch.uint8)
    bits = (padded.view(m, -1, 8) * powers).sum(2, dtype=torch.uint8)
    offsets = torch.zeros(m + 1, dtype=torch.int64, device=weight.device)
    offsets[1:] = kept.sum(1).cumsum(0)
    return {"values": weight[kept], "bits": bits, "offsets": offsets}


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
    "2:4": Storage(("values", "positions"), pack_2_4, PackedRows2of4, 1),
    "bitmask": Storage(("values", "bits", "offsets"), pack_bitmask, PackedRowsBitmask, 1),
}


def choose_packing(weight: Tensor) -> str:
    """`2:4` where the weight (m, n) holds that pattern, else `bitmask`."""
    m, n = weight.shape
    if n % 4 == 0 and bool(((weight.reshape(m, n // 4, 4) != 0).sum(2) <= 2).all()):
        return "2:4"
    return "bitmask"


def unpack_2_4(values: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Lay out 2:4 rows.

    Args:
        values: (rows, n/2), the two of each group in order.
        positions: (rows, ceil(n/8)) uint8, four bits a group, the even group in the low ones: the first
            value's lane in the lower two, the second's in the upper two.
        out: (rows, n) of values' dtype; every element is written.
    """
    kernels = _kernels(out)
    if kernels is not None:
        kernels.unpack_2_4(_integers(values), as_array(positions), _integers(out))
        return out
    rows, groups = len(out), out.shape[1] // 4
    nibbles = torch.stack((positions & 15, positions >> 4), dim=2).flatten(1)[:, :groups]
    lanes = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    out.view(rows, groups, 4).zero_().scatter_(2, lanes, values.view(rows, groups, 2))
    return out


def unpack_bitmask(values: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """Lay out rows of any pattern.

    Args:
        values: (nnz,), the non-zeros of these rows in row-major order.
        bits: (rows, ceil(n/8)) uint8, least significant bit first.
        out: (rows, n) of values' dtype; every element is written.
    """
    kernels = _kernels(out)
    if kernels is not None:
        kernels.unpack_bitmask(_integers(values), as_array(bits), _integers(out))
        return out
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits.unsqueeze(2) >> shifts) & 1).flatten(1)[:, : out.shape[1]].bool()
    return out.zero_().masked_scatter_(kept, values)


def _kernels(out: Tensor) -> Any:
    return optional_module("spp_fx.adapters.cpu") if out.device.type == "cpu" else None


def _integers(tensor: Tensor) -> Any:
    """A CPU tensor as a numpy array of integers of its width."""
    return as_array(tensor.view(INTEGERS[tensor.element_size()]))


def as_array(tensor: Tensor) -> Any:
    """A CPU tensor's memory as a numpy array; half precision as unsigned integers: numpy has no bfloat16.

    Through DLPack: `Tensor.numpy` would forbid the storage to be resized, and FSDP resizes what it gathers.
    """
    tensor = tensor.detach()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return np.from_dlpack(tensor.view(torch.uint16) if half else tensor)


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
