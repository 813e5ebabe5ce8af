"""PackedMask: where a weight is non-zero, one bit an element; its digest, and naming flipped positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from spp_fx.errors import MaskError
from spp_fx.parallel import thread_count
from spp_fx.sparsity.kernels import BUCKETS, locate, popcount

_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Where a weight is non-zero.

    Attributes:
        shape: (out, in), or (experts, out, in) for an expert stack, whatever the storage order.
        bits: (ceil(numel / 8),) uint8, the flat row-major mask, LSB first, without padding between rows:
            `np.packbits(mask.reshape(-1), bitorder="little")`. Held as a read-only view.

    Raises:
        MaskError: shape and bits do not belong together, or a bit past the last element is set.
    """

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 0:
            raise MaskError(f"a mask has the shape (out, in) or (experts, out, in), not {self.shape}")
        numel = self.numel
        if self.bits.dtype != np.uint8 or self.bits.shape != ((numel + 7) // 8,):
            raise MaskError(
                f"a mask of shape {self.shape} packs into ({(numel + 7) // 8},) uint8, "
                f"not {self.bits.shape} {self.bits.dtype}"
            )
        if numel % 8 and int(self.bits[-1]) >> numel % 8:
            raise MaskError(f"a mask of shape {self.shape} has bits set past its last element")
        view = np.ascontiguousarray(self.bits).view()
        view.flags.writeable = False
        object.__setattr__(self, "bits", view)

    @classmethod
    def counted(cls, shape: tuple[int, ...], bits: NDArray[np.uint8], nnz: int) -> "PackedMask":
        """A mask whose non-zeros are already counted."""
        mask = cls(shape, bits)
        mask.__dict__["nnz"] = nnz
        return mask

    @classmethod
    def from_bool(cls, mask: NDArray[np.bool_]) -> "PackedMask":
        """Pack a boolean array of shape (out, in) or (experts, out, in)."""
        return cls(mask.shape, np.packbits(mask.reshape(-1), bitorder="little"))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the flattened weight: out, or experts * out."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Length of a row, the input dimension."""
        return self.shape[-1]

    @cached_property
    def nnz(self) -> int:
        return sum(popcount(self.bits[at : at + _BLOCK]) for at in range(0, self.bits.size, _BLOCK))

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0 for a weight without elements."""
        return 1.0 - self.nnz / self.numel if self.numel else 0.0

    def row_name(self, row: int) -> str:
        """A row of the flattened weight as messages name it: 'row 17', of a stack 'expert 2, row 5'."""
        if len(self.shape) == 2:
            return f"row {row}"
        expert, row = divmod(row, self.shape[1])
        return f"expert {expert}, row {row}"

    @cached_property
    def digest(self) -> str:
        """64 hex digits: BLAKE3 over the shape as little-endian int64s, then the bits.

        The shape makes equal bits of different matrices differ; the bits do not depend on dtype,
        storage order or sharding.
        """
        state = blake3(np.asarray(self.shape, dtype="<i8").tobytes(), max_threads=thread_count())
        return state.update(self.bits.data).hexdigest()

    def to_bool(self) -> NDArray[np.bool_]:
        """The mask as a boolean array of `shape`."""
        ones = np.unpackbits(self.bits, count=self.numel, bitorder="little")
        return ones.view(np.bool_).reshape(self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.shape, self.digest))


LOCATOR_DIGITS = BUCKETS * 16


def locator(mask: PackedMask) -> str:
    """128 hex digits: the 8 buckets of `kernels.locate` in order, 16 digits a bucket.

    A flipped position changes its bucket's sum by exactly its own number, so one flip a bucket can be read off the
    difference. Two in one bucket give a wrong number: what `propose_flips` returns is a guess until the digest of
    the mask with these flips undone proves it.
    """
    return "".join(f"{total:016x}" for total in locate(mask.bits, mask.rows, mask.columns))


def propose_flips(then: str, now: str, mask: PackedMask) -> list[int] | None:
    """Linear indices that would explain the difference of two locators, at most one a bucket, ascending.

    None where there are none: the locators agree, or a difference is not a position of its bucket.
    """
    flips: list[int] = []
    for bucket in range(BUCKETS):
        digits = slice(16 * bucket, 16 * bucket + 16)
        if number := int(then[digits], 16) ^ int(now[digits], 16):
            index = number - 1
            if index >= mask.numel or index // mask.columns % BUCKETS != bucket:
                return None
            flips.append(index)
    return sorted(flips) or None


def flip(mask: PackedMask, indices: Sequence[int]) -> PackedMask:
    """A copy of the mask with the bits at these distinct linear indices inverted."""
    bits: NDArray[np.uint8] = mask.bits.copy()
    for index in indices:
        bits[index // 8] ^= np.uint8(1 << index % 8)
    return PackedMask(mask.shape, bits)
