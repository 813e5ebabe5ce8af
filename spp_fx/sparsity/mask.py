"""PackedMask: where one weight is non-zero, one bit an element; its digest, and naming flipped positions.

One BLAKE2b is serial, but different masks are independent messages: eight of them share the lanes of a
vector. A lane takes a mask in segments: its first block, copied because it joins the shape and the first
bits; then the bits where they lie; then the last block, copied because it is padded. Between two calls
of the kernel every lane moves by the same number of blocks, up to the next end of a segment.

Bucket b holds the XOR of (linear index + 1) over the non-zeros of the rows r with r % 8 == b. A position
that appears or disappears changes its bucket's sum by exactly its own number, so one flip a bucket can be
read off the difference. Two in one bucket give a wrong number: a proposal is a guess until the digest of
the mended mask proves it.
"""

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import MaskError
from spp_fx.sparsity import _blake2b as blake2b
from spp_fx.sparsity._backend import Bytes, backend

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


_DIGEST_SIZE = 32
_SMALL = 32 << 10  # bytes; below, hashlib is done before a mask is in its lane
_LANES_COST = 2  # one block in every lane takes about as long as this many of hashlib's


def digest_masks(masks: Sequence[PackedMask]) -> None:
    """Find the digests that `masks` do not have yet, so that `mask.digest` is there when asked for.

    As fast as hashlib for one mask, several times faster for many of about the same size. The bits are
    read where they lie, without the interpreter's lock. Without llvmlite, or on a CPU without vectors of 256
    bits, hashlib finds all of them.
    """
    missing = list({id(mask): mask for mask in masks if "digest" not in mask.__dict__}.values())
    together = _worth_lanes([mask for mask in missing if mask.bits.size >= _SMALL])
    kernel = _kernel() if together else None
    if kernel is not None:
        _hash_in_lanes(kernel, together)
    for mask in missing:
        _ = mask.digest  # by hashlib, unless the lanes found it


@cache
def _kernel() -> blake2b.Absorb | None:
    try:
        return blake2b.load_absorb()
    except ImportError:
        return None


def _worth_lanes(masks: list[PackedMask]) -> list[PackedMask]:
    """Those to hash in lanes, largest first: all but the few largest that would keep the other lanes idle."""
    masks = sorted(masks, key=lambda mask: -mask.bits.size)
    sizes = [mask.bits.size for mask in masks]
    alone = min(
        range(min(len(sizes), blake2b.LANES) + 1), key=lambda n: sum(sizes[:n]) + _lanes_time(sizes[n:])
    )
    return masks[alone:]


def _lanes_time(sizes: list[int]) -> int:
    """Time in lanes, in the unit of hashlib's bytes, if each lane that ends takes the next mask."""
    busy = [0] * blake2b.LANES
    for size in sizes:
        heapq.heapreplace(busy, busy[0] + size)
    return _LANES_COST * max(busy)


@dataclass(frozen=True)
class _Segment:
    """Consecutive blocks of one message.

    Attributes:
        data: where they lie; held so that the memory stays.
        start: byte of `data` at which the first block begins.
        blocks: their number, at least 1.
        counter: what BLAKE2b's counter is 128 short of in the first block.
        final: they are one block, the message's last.
    """

    data: Bytes
    start: int
    blocks: int
    counter: int
    final: bool


def _segments(mask: PackedMask) -> Iterator[_Segment]:
    """The message that `PackedMask.digest` defines: the shape as little-endian int64s, then the bits."""
    shape = np.asarray(mask.shape, dtype="<i8").view(np.uint8)
    length = shape.size + mask.bits.size
    joined = np.zeros(blake2b.BLOCK, dtype=np.uint8)
    bits = min(mask.bits.size, blake2b.BLOCK - shape.size)
    joined[: shape.size] = shape
    joined[shape.size : shape.size + bits] = mask.bits[:bits]
    if length <= blake2b.BLOCK:
        yield _Segment(joined, 0, 1, length - blake2b.BLOCK, True)
        return
    yield _Segment(joined, 0, 1, 0, False)
    last = (length - 1) // blake2b.BLOCK  # the last block is never empty
    if last > 1:
        yield _Segment(mask.bits, bits, last - 1, blake2b.BLOCK, False)
    rest = mask.bits[last * blake2b.BLOCK - shape.size :]
    padded = np.zeros(blake2b.BLOCK, dtype=np.uint8)
    padded[: rest.size] = rest
    yield _Segment(padded, 0, 1, length - blake2b.BLOCK, True)


def _hash_in_lanes(absorb: blake2b.Absorb, masks: Sequence[PackedMask]) -> None:
    waiting = deque(masks)
    table: NDArray[np.uint64] = np.zeros((blake2b.ROWS, blake2b.LANES), dtype=np.uint64)
    lanes = [_lane(table[:, lane], waiting) for lane in range(blake2b.LANES)]
    current = [next(lane, None) for lane in lanes]
    left = [segment.blocks if segment else 0 for segment in current]
    while any(left):
        # An idle lane repeats what a busy one reads: any memory that is there will do.
        table[blake2b.ADDRESS, [not blocks for blocks in left]] = table[
            blake2b.ADDRESS, left.index(max(left))
        ]
        step = min(blocks for blocks in left if blocks)
        absorb(table, step)
        for lane, blocks in enumerate(left):
            left[lane] = max(0, blocks - step)
            if blocks == step:
                current[lane] = next(lanes[lane], None)
                left[lane] = segment.blocks if (segment := current[lane]) else 0


def _lane(column: NDArray[np.uint64], waiting: deque[PackedMask]) -> Iterator[_Segment]:
    """Hash one waiting mask after another; resumed whenever the segment it gave last was absorbed."""
    while waiting:
        mask = waiting.popleft()
        column[blake2b.STATE] = blake2b.initial_state(_DIGEST_SIZE)
        for segment in _segments(mask):
            column[blake2b.COUNTER] = segment.counter % (1 << 64)
            column[blake2b.FINAL] = ~np.uint64(0) if segment.final else np.uint64(0)
            column[blake2b.ADDRESS] = segment.data.__array_interface__["data"][0] + segment.start
            yield segment
        mask.__dict__["digest"] = column[blake2b.STATE].tobytes()[:_DIGEST_SIZE].hex()


BUCKETS = 8
LOCATOR_DIGITS = BUCKETS * 16


def locator(mask: PackedMask) -> str:
    """128 hex digits, 16 a bucket, bucket 0 first."""
    sums = backend().locate(mask.bits, mask.rows, mask.columns)
    return "".join(f"{int(total):016x}" for total in sums)


def propose_flips(then: str, now: str, mask: PackedMask) -> list[int] | None:
    """Linear indices that would explain the difference of two locators, at most one a bucket, ascending.

    None where no such set exists: the locators agree, or a difference is no position of its bucket.
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
