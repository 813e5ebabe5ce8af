"""Digests of several masks at once.

One BLAKE2b is serial, but different masks are independent messages: eight of them share the lanes of a
vector. A lane takes a mask in segments: its first block, copied because it joins the shape and the first
bits; then the bits where they lie; then the last block, copied because it is padded. Between two calls
of the kernel every lane moves by the same number of blocks, up to the next end of a segment.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from spp_fx.sparsity import _blake2b as blake2b
from spp_fx.sparsity._backend import Bytes
from spp_fx.sparsity.mask import PackedMask

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
