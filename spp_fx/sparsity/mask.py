"""PackedMask: where one weight is non-zero, one bit an element."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import MaskError

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
    def measured(
        cls, shape: tuple[int, ...], bits: NDArray[np.uint8], nnz: int, digest: str | None
    ) -> "PackedMask":
        """A mask whose count, and perhaps digest, was found on the way, so that it needs no second look."""
        mask = cls(shape, bits)
        mask.__dict__.update(nnz=nnz, **({} if digest is None else {"digest": digest}))
        return mask

    @classmethod
    def from_bool(cls, mask: NDArray[np.bool_]) -> "PackedMask":
        """Pack a boolean array of shape (out, in) or (experts, out, in)."""
        return cls(mask.shape, np.packbits(mask.reshape(-1), bitorder="little"))

    @property
    def numel(self) -> int:
        """Elements of the weight."""
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
        """Non-zero elements."""
        blocks = range(0, self.bits.size, _BLOCK)
        return sum(int(np.bitwise_count(self.bits[at : at + _BLOCK]).sum(dtype=np.int64)) for at in blocks)

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0 for a weight without elements."""
        return 1.0 - self.nnz / self.numel if self.numel else 0.0

    @cached_property
    def digest(self) -> str:
        """64 hex digits: BLAKE2b-256 over the shape as little-endian int64s, then the bits.

        The shape makes equal bits of different matrices differ; the bits do not depend on dtype,
        storage order or sharding.
        """
        state = digest_state(self.shape)
        state.update(self.bits.data)
        return state.hexdigest()

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


def digest_state(shape: tuple[int, ...]) -> "hashlib.blake2b":
    """The running hash of a mask digest, with the shape already in it."""
    return hashlib.blake2b(np.asarray(shape, dtype="<i8").tobytes(), digest_size=32)
