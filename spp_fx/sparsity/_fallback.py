"""The kernels in plain numpy: the definition the compiled ones are held to, and the way without compilers."""

import numpy as np

from spp_fx.sparsity._backend import Backend, Bytes, Elements, Words

_BLOCK_BITS = 1 << 20


def scan_elements(
    elements: Elements, magnitude: int, non_finite_from: int, non_finite_span: int, out: Bytes
) -> tuple[int, int, int]:
    kind = elements.dtype.type
    magnitudes = elements & kind(magnitude)
    packed = np.packbits(magnitudes != 0, bitorder="little")
    out[: packed.size] = packed
    non_zeros = int(np.bitwise_count(packed).sum(dtype=np.int64))
    if non_finite_span == 0:
        return non_zeros, 0, -1
    strange = magnitudes - kind(non_finite_from) < kind(non_finite_span)
    count = int(np.count_nonzero(strange))
    return non_zeros, count, int(strange.argmax()) if count else -1


def _over(bits: Bytes, start: int, groups: int, group: int, kept: int) -> Words:
    first, last = start * group, (start + groups) * group
    ones = np.unpackbits(bits[first // 8 : (last + 7) // 8], bitorder="little")
    counts = ones[first % 8 : first % 8 + groups * group].reshape(groups, group).sum(axis=1)
    return np.flatnonzero(counts > kept).astype(np.uint64)


def count_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    step = max(1, _BLOCK_BITS // group)
    return sum(
        _over(bits, start, min(step, groups - start), group, kept).size for start in range(0, groups, step)
    )


def first_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    step = max(1, _BLOCK_BITS // group)
    for start in range(0, groups, step):
        found = _over(bits, start, min(step, groups - start), group, kept)
        if found.size:
            return start + int(found[0])
    return -1


def transpose_bits(source: Bytes, target: Bytes, base: int, rows: int, columns: int) -> None:
    """Holds one byte an element of the matrix while it works."""
    end = base + rows * columns
    first, last = base // 8, (end + 7) // 8
    ones = np.unpackbits(source[first:last], bitorder="little")
    moved = np.zeros(8 * (last - first), dtype=np.uint8)
    inside = slice(base - 8 * first, end - 8 * first)
    moved[inside] = ones[inside].reshape(rows, columns).T.reshape(-1)
    target[first:last] |= np.packbits(moved, bitorder="little")


def locate(bits: Bytes, rows: int, columns: int) -> Words:
    buckets = np.zeros(8, dtype=np.uint64)
    step = _BLOCK_BITS // 8
    for start in range(0, bits.size, step):
        ones = np.flatnonzero(np.unpackbits(bits[start : start + step], bitorder="little")) + 8 * start
        bucket = (ones // max(1, columns)) % 8
        for index in range(8):
            indices = (ones[bucket == index] + 1).astype(np.uint64)
            buckets[index] ^= np.bitwise_xor.reduce(indices, initial=np.uint64(0))
    return buckets


BACKEND = Backend(
    name="numpy",
    scan_elements=scan_elements,
    scan_descriptor=None,
    count_over=count_over,
    first_over=first_over,
    transpose_bits=transpose_bits,
    locate=locate,
)
