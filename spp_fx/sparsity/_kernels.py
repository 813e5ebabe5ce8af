"""The kernels that a check calls only where something is wrong or unusual, compiled by numba.

They run without the GIL, and are cached on disk where a cache folder can be written.

Constants are spelled `np.uint64`: numba turns a mix of signed and unsigned 64-bit numbers into floats.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from spp_fx.parallel import thread_count
from spp_fx.sparsity import _intrinsics
from spp_fx.sparsity._backend import Bytes, Words
from spp_fx.sparsity._compile import compiled

if sys.byteorder != "little":
    raise ImportError("the compiled kernels read mask words as little-endian")

# Spelled as untyped callables: a call inside a kernel leaves out the typing context of the definition.
load_word: Callable[..., Any] = _intrinsics.load_word
popcount: Callable[..., Any] = _intrinsics.popcount

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_TOP = np.uint64(1 << 63)
_THREADED_BITS = 1 << 24
_TILE = 512  # rows transposed together: one cache line of each target row


@compiled
def _load_bits(bits: Bytes, position: int, count: int) -> np.uint64:
    """`count` <= 64 bits from bit `position`; never reads past the last byte that holds one of them."""
    first = position // 8
    offset = position % 8
    last = (position + count + 7) // 8
    word = np.uint64(bits[first]) >> np.uint64(offset)
    for byte in range(first + 1, min(last, first + 8)):
        word |= np.uint64(bits[byte]) << np.uint64(8 * (byte - first) - offset)
    if last > first + 8:
        word |= np.uint64(bits[first + 8]) << np.uint64(64 - offset)
    if count < 64:
        word &= (_ONE << np.uint64(count)) - _ONE
    return word


@compiled
def count_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    count = 0
    for index in range(groups):
        if popcount(_load_bits(bits, index * group, group)) > kept:
            count += 1
    return count


@compiled
def first_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    for index in range(groups):
        if popcount(_load_bits(bits, index * group, group)) > kept:
            return index
    return -1


@compiled
def _transpose8(block: np.uint64) -> np.uint64:
    """Transpose the 8x8 bit matrix whose row i is byte i: swap 1x1, 2x2, then 4x4 off-diagonal blocks."""
    swap = (block ^ (block >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
    block ^= swap ^ (swap << np.uint64(7))
    swap = (block ^ (block >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
    block ^= swap ^ (swap << np.uint64(14))
    swap = (block ^ (block >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
    return block ^ swap ^ (swap << np.uint64(28))


@compiled
def _transpose_bytes(source: Bytes, target: Bytes, rows: int, columns: int, start: int, stop: int) -> None:
    """Whole bytes in both orders; `start` and `stop` bound the columns, all multiples of 8."""
    for tile in range(0, rows, _TILE):
        for column in range(start, stop, 8):
            for row in range(tile, min(tile + _TILE, rows), 8):
                block = _ZERO
                for i in range(8):
                    byte = source[((row + i) * columns + column) // 8]
                    block |= np.uint64(byte) << np.uint64(8 * i)
                block = _transpose8(block)
                for j in range(8):
                    byte = np.uint8((block >> np.uint64(8 * j)) & np.uint64(0xFF))
                    target[((column + j) * rows + row) // 8] = byte


@compiled
def _transpose_any(source: Bytes, target: Bytes, base: int, rows: int, columns: int) -> None:
    for tile in range(0, rows, _TILE):
        for column in range(0, columns, 8):
            width = min(8, columns - column)
            for row in range(tile, min(tile + _TILE, rows), 8):
                block = _ZERO
                for i in range(min(8, rows - row)):
                    eight = _load_bits(source, base + (row + i) * columns + column, width)
                    block |= eight << np.uint64(8 * i)
                block = _transpose8(block)
                for j in range(width):
                    eight = (block >> np.uint64(8 * j)) & np.uint64(0xFF)
                    position = base + (column + j) * rows + row
                    pair = eight << np.uint64(position % 8)
                    target[position // 8] |= np.uint8(pair & np.uint64(0xFF))
                    if pair >> np.uint64(8):
                        target[position // 8 + 1] |= np.uint8(pair >> np.uint64(8))


@compiled
def _word_at(bits: Bytes, index: int) -> np.uint64:
    if index * 8 + 8 <= bits.size:
        return load_word(bits, index * 8)
    return _load_bits(bits, index * 64, 8 * (bits.size - index * 8))


@compiled
def locate(bits: Bytes, rows: int, columns: int) -> Words:
    """Word by word: the numbers 64 w + j + 1 of a word share their high bits (j = 63 apart).

    So their XOR is the shared part where the count is odd, and the low six bits follow from the XOR of
    all words of a bucket: bit k is the parity of the ones at those j for which j + 1 has bit k.
    """
    buckets = np.zeros(8, dtype=np.uint64)
    for bucket in range(min(8, rows)):
        folded = _ZERO
        high = _ZERO
        for row in range(bucket, rows, 8):
            start = row * columns
            end = start + columns
            for index in range(start // 64, (end + 63) // 64):
                word = _word_at(bits, index)
                if start > index * 64:
                    word &= _ALL << np.uint64(start - index * 64)
                if end < index * 64 + 64:
                    word &= ~(_ALL << np.uint64(end - index * 64))
                folded ^= word
                if popcount(word & ~_TOP) % 2:
                    high ^= np.uint64(index * 64)
                if word & _TOP:
                    high ^= np.uint64(index * 64 + 64)
        low = _ZERO
        for j in range(63):
            if (folded >> np.uint64(j)) & _ONE:
                low ^= np.uint64(j + 1)
        buckets[bucket] = high ^ low
    return buckets


def transpose_bits(source: Bytes, target: Bytes, base: int, rows: int, columns: int) -> None:
    if base % 8 or rows % 8 or columns % 8:
        _transpose_any(source, target, base, rows, columns)
        return
    source, target = source[base // 8 :], target[base // 8 :]
    if rows * columns < _THREADED_BITS:
        _transpose_bytes(source, target, rows, columns, 0, columns)
        return
    # Whole target rows to each thread, so that no two write one byte.
    step = -(-columns // (8 * thread_count())) * 8
    starts = range(0, columns, step)
    with ThreadPoolExecutor(len(starts)) as pool:
        for done in [
            pool.submit(_transpose_bytes, source, target, rows, columns, at, min(at + step, columns))
            for at in starts
        ]:
            done.result()
