"""Name flipped mask positions from 64 bytes: eight XOR sums beside a digest.

Bucket b holds the XOR of (linear index + 1) over the non-zeros of the rows r with r % 8 == b. A position
that appears or disappears changes its bucket's sum by exactly its own number, so one flip a bucket can be
read off the difference. Two in one bucket give a wrong number: a proposal is a guess until the digest of
the mended mask proves it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spp_fx.sparsity._backend import backend
from spp_fx.sparsity.mask import PackedMask

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
