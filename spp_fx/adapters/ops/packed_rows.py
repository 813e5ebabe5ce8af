"""Rows of packed weights, laid out where a kernel asks for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.adapters.ops.unpack import unpack_2_4, unpack_bitmask


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
