"""Loops over weights and mask bits: element types, zeros and non-finite values, full groups, transposition, locator.

All in numpy, except that the scan of weights and the count of full groups are compiled where llvmlite is installed:
several times faster.
Mask bits are packed LSB first: element i is bit i % 8 of byte i // 8.
"""

import functools
import math
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_fx.compiled import optional_module
from spp_fx.errors import FormatError
from spp_fx.storage.safetensors import dtype_name

if TYPE_CHECKING:
    import torch

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

_BLOCK_BITS = 1 << 20  # bits that are spread to a byte each at once
_BLOCK_WORDS = 1 << 14  # words counted at once: they and what is made of them fit a core's cache
_COMPILED_WORDS = 1 << 14  # fewer are counted faster than the count is compiled
_ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True)
class ElementType:
    """The bits of one element type, taken as an unsigned integer x of `itemsize` bytes.

    x is non-zero iff `x & magnitude != 0`, and non-finite iff `(x & magnitude) - non_finite_from`, wrapped, is below
    `non_finite_span`. No floating-point unit is involved, so denormals-are-zero modes cannot change the answer.
    """

    name: str
    itemsize: int
    magnitude: int
    non_finite_from: int
    non_finite_span: int


def _ieee(name: str, itemsize: int, exponent_bits: int) -> ElementType:
    magnitude = (1 << (8 * itemsize - 1)) - 1
    mantissa_bits = 8 * itemsize - 1 - exponent_bits
    first = ((1 << exponent_bits) - 1) << mantissa_bits
    return ElementType(name, itemsize, magnitude, first, magnitude - first + 1)


def _integer(name: str, itemsize: int) -> ElementType:
    return ElementType(name, itemsize, (1 << 8 * itemsize) - 1, 0, 0)


# F8_E4M3 (the "fn" flavour) has no infinities and one NaN a sign; the "fnuz" types have no negative
# zero: 0x80 is their only NaN. F8_E8M0 is absent on purpose: it is an exponent and has no zero.
_TYPES = {
    kind.name: kind
    for kind in (
        _ieee("F64", 8, 11),
        _ieee("F32", 4, 8),
        _ieee("F16", 2, 5),
        _ieee("BF16", 2, 8),
        _ieee("F8_E5M2", 1, 5),
        ElementType("F8_E4M3", 1, 0x7F, 0x7F, 1),
        ElementType("F8_E5M2FNUZ", 1, 0xFF, 0x80, 1),
        ElementType("F8_E4M3FNUZ", 1, 0xFF, 0x80, 1),
        *(_integer(f"{sign}{8 * size}", size) for sign in "IU" for size in (1, 2, 4, 8)),
        _integer("BOOL", 1),
    )
}


def element_type(dtype: "str | torch.dtype") -> ElementType:
    """The element type of a safetensors dtype name ('BF16') or a torch dtype.

    Raises:
        FormatError: a type whose zeros cannot be read from whole elements (packed 4-bit, complex, ...).
    """
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in _TYPES:
        raise FormatError(f"zeros cannot be counted in dtype {dtype}; supported: {', '.join(_TYPES)}")
    return _TYPES[name]


ScanElements = Callable[[NDArray[Any], ElementType, Bytes], tuple[int, int]]

_scanners: dict[int, ScanElements] = {}
_compiling = threading.Lock()


def scanner(itemsize: int) -> ScanElements:
    """The fastest `scan_elements` that this installation has for elements of 1, 2, 4 or 8 bytes."""
    with _compiling:
        if itemsize not in _scanners:
            module = optional_module("spp_fx.sparsity.compiled_scan")
            _scanners[itemsize] = module.compile_scan(itemsize) if module else scan_elements
        return _scanners[itemsize]


def scan_elements(elements: NDArray[Any], kind: ElementType, out: Bytes) -> tuple[int, int]:
    """Write the mask of weights and count what is in them.

    Args:
        elements: 1-D, as unsigned integers.
        kind: of the elements.
        out: receives ceil(len / 8) mask bytes; the bytes after them are not written.

    Returns:
        How many elements are non-zero, and how many are non-finite.
    """
    magnitudes = elements & elements.dtype.type(kind.magnitude)
    packed = np.packbits(magnitudes != 0, bitorder="little")
    out[: packed.size] = packed
    return popcount(packed), int(np.count_nonzero(_non_finite(magnitudes, kind)))


def first_non_finite(elements: NDArray[Any], kind: ElementType) -> int:
    """Index of the first infinite or NaN element; there must be one."""
    return int(_non_finite(elements & elements.dtype.type(kind.magnitude), kind).argmax())


def _non_finite(magnitudes: NDArray[Any], kind: ElementType) -> NDArray[np.bool_]:
    unsigned = magnitudes.dtype.type
    return magnitudes - unsigned(kind.non_finite_from) < unsigned(kind.non_finite_span)


def popcount(bits: Bytes | Words) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def count_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    """How many of the first `groups` groups of `group` bits hold more than `kept` ones."""
    if 64 % group or kept >= group:
        step = max(1, _BLOCK_BITS // group)
        return sum(_over(bits, at, min(step, groups - at), group, kept).size for at in range(0, groups, step))
    whole = groups * group // 64
    words = bits[: 8 * whole].view("<u8")
    tail = int.from_bytes(bits[8 * whole : (groups * group + 7) // 8].tobytes(), "little")
    last = np.array([tail & ((1 << groups * group % 64) - 1)], dtype=np.uint64)
    count = (
        _counter(group, kept) if whole >= _COMPILED_WORDS else partial(count_in_words, group=group, kept=kept)
    )
    return count(words) + count(last)


CountInWords = Callable[[Words], int]

_counters: dict[tuple[int, int], CountInWords] = {}


def _counter(group: int, kept: int) -> CountInWords:
    """`count_in_words` for one pattern, compiled where that is possible."""
    with _compiling:
        if (group, kept) not in _counters:
            module = optional_module("spp_fx.sparsity.compiled_scan")
            plain = partial(count_in_words, group=group, kept=kept)
            _counters[group, kept] = module.compile_count(group, kept) if module else plain
        return _counters[group, kept]


@dataclass(frozen=True)
class FieldSums:
    """How the groups of a word are counted and compared all at once.

    Fields of 1, 2, 4, ... bits hold the ones in them, and neighbours are added until a field is a group. Adding
    2**(group - 1) - 1 - kept to a count of at most `group` sets the field's top bit iff the count is above `kept`,
    and cannot carry out of the field.

    Attributes:
        steps: size of the fields, and the lower half of every field of twice the size.
        raised: what is added to every field.
        top: the top bit of every field.
    """

    steps: tuple[tuple[int, int], ...]
    raised: int
    top: int

    @classmethod
    def of(cls, group: int, kept: int) -> "FieldSums":
        sizes = [1 << i for i in range(group.bit_length() - 1)]
        every = _ALL_ONES // ((1 << group) - 1)  # the lowest bit of every field
        steps = tuple((size, _ALL_ONES // ((1 << size) + 1)) for size in sizes)
        return cls(steps, every * ((1 << (group - 1)) - 1 - kept), every << (group - 1))


def count_in_words(words: Words, group: int, kept: int) -> int:
    """`count_over` of groups that fill words, by `FieldSums`."""
    fields, total = FieldSums.of(group, kept), 0
    for at in range(0, words.size, _BLOCK_WORDS):
        counts = words[at : at + _BLOCK_WORDS]
        for size, half in fields.steps:
            upper = counts >> np.uint64(size)
            upper &= np.uint64(half)
            counts = counts & np.uint64(half)
            counts += upper
        over = counts + np.uint64(fields.raised)
        over &= np.uint64(fields.top)
        total += popcount(over) if over.any() else 0
    return total


def first_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    """The first of the groups that `count_over` counts, or -1."""
    step = max(1, _BLOCK_BITS // group)
    for at in range(0, groups, step):
        found = _over(bits, at, min(step, groups - at), group, kept)
        if found.size:
            return at + int(found[0])
    return -1


def _over(bits: Bytes, start: int, groups: int, group: int, kept: int) -> NDArray[np.intp]:
    first, last = start * group, (start + groups) * group
    ones = np.unpackbits(bits[first // 8 : (last + 7) // 8], bitorder="little")
    counts = ones[first % 8 : first % 8 + groups * group].reshape(groups, group).sum(axis=1)
    return np.flatnonzero(counts > kept)


def transpose_bits(bits: Bytes, shape: tuple[int, ...]) -> Bytes:
    """The packed mask of shape (..., columns, rows), given that of shape (..., rows, columns)."""
    if not bits.size:
        return bits.copy()
    *outer, rows, columns = shape
    count, high, wide = math.prod(outer), -(-rows // 64), -(-columns // 64)
    if rows % 64 or columns % 64:  # spread to a byte for each element, to be padded to whole words
        ones = np.zeros((count, 64 * high, 64 * wide), dtype=np.uint8)
        spread = np.unpackbits(bits, count=math.prod(shape), bitorder="little")
        ones[:, :rows, :columns] = spread.reshape(count, rows, columns)
        words = np.packbits(ones, bitorder="little").view("<u8")
    else:
        words = bits.view("<u8").copy()
    _transpose_blocks(words.reshape(-1, 64, wide))
    # Row 64 r + j of the block in column c is now column 64 r to 64 r + 63 of row 64 c + j.
    moved = words.reshape(count, high, 64, wide).transpose(0, 3, 2, 1)
    moved = np.ascontiguousarray(moved).reshape(-1).view(np.uint8)
    if not (rows % 64 or columns % 64):
        return moved
    ones = np.unpackbits(moved, bitorder="little").reshape(count, 64 * wide, 64 * high)
    return np.packbits(ones[:, :columns, :rows], bitorder="little")


def _transpose_blocks(words: Words) -> None:
    """Transpose every 64 x 64 bits of (blocks, 64, words of a row), in place.

    Each step swaps the upper right quarter of a block with the lower left one, and halves the blocks.
    """
    distance, mask = 32, np.uint64(0x00000000FFFFFFFF)
    while distance:
        halves = words.reshape(-1, 2, distance, words.shape[-1])
        upper, lower, shift = halves[:, 0], halves[:, 1], np.uint64(distance)
        swap = upper >> shift
        swap ^= lower
        swap &= mask
        lower ^= swap
        swap <<= shift
        upper ^= swap
        distance //= 2
        mask ^= mask << np.uint64(distance)


BUCKETS = 8


def locate(bits: Bytes, rows: int, columns: int) -> list[int]:
    """Bucket b: the XOR of (linear index + 1) over the ones of the rows r with r % 8 == b.

    XOR is its own inverse, so the sum of a row is that of all ones before its end XOR that of all ones before its
    start. Within a word, the numbers 64 w + j + 1 differ only in the low six bits (except j = 63), which are the
    same for all words: the XOR of the words gives them at once.
    """
    words = np.zeros((bits.size + 7) // 8 + 1, dtype="<u8")
    words.view(np.uint8)[: bits.size] = bits
    folded = np.zeros(words.size + 1, dtype=np.uint64)  # the XOR of all words before one
    higher = np.zeros(words.size + 1, dtype=np.uint64)  # the same of their numbers, without the low six bits
    np.bitwise_xor.accumulate(words, out=folded[1:])
    for at in range(0, words.size, _BLOCK_WORDS):
        block = words[at : at + _BLOCK_WORDS]
        higher[at + 1 : at + 1 + block.size] = _higher_bits(block, np.arange(at, at + block.size))
    np.bitwise_xor.accumulate(higher, out=higher)

    ends = columns * np.arange(rows + 1)
    index = ends // 64
    cut = words[index] & ((np.uint64(1) << (ends % 64).astype(np.uint64)) - np.uint64(1))
    folded, higher = folded[index] ^ cut, higher[index] ^ _higher_bits(cut, index)
    sums: list[int] = []
    for bucket in range(BUCKETS):
        word, high = (
            int(np.bitwise_xor.reduce((each[1:] ^ each[:-1])[bucket::BUCKETS])) for each in (folded, higher)
        )
        numbers = (j + 1 for j in range(63) if word >> j & 1)
        sums.append(functools.reduce(operator.xor, numbers, high))
    return sums


def _higher_bits(words: Words, index: NDArray[np.int64]) -> Words:
    """The XOR over the ones j of each word of 64 i + j + 1, without its low six bits; i is the word's index."""
    start = index.astype(np.uint64) << np.uint64(6)
    odd = np.bitwise_count(words & np.uint64(_ALL_ONES >> 1)) & np.uint8(1)
    return start * odd ^ (start + np.uint64(64)) * (words >> np.uint64(63))
