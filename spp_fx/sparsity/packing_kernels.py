"""The loops of packing, compiled by numba: 2:4 rows, bit masks, and the order of metadata in packs.

Elements are unsigned integers of their width. A kernel counts faults and continues; the torch code that defines
the kernel then runs and names the first one. Rows are slices, and conditions are integers instead of booleans
joined by `and` and `or`, so that LLVM vectorizes the loops.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false

import sys

import numpy as np
from numba import njit

from spp_fx.compiled import compiled

if sys.byteorder != "little":
    raise ImportError("the compiled kernels read elements as little-endian")

EMPTY_GROUP = np.uint8(0xE)
_ONE, _TWO, _THREE, _LOW = np.uint8(1), np.uint8(2), np.uint8(3), np.uint8(0xF)


@compiled
def _join(nibbles, positions):
    """Nibbles (groups,) as bytes, the first in the low half; the last of an odd number is joined with 0xE."""
    pairs = nibbles.shape[0] // 2
    for byte in range(pairs):
        positions[byte] = nibbles[2 * byte] | (nibbles[2 * byte + 1] << 4)
    if nibbles.shape[0] % 2:
        positions[pairs] = nibbles[2 * pairs] | (EMPTY_GROUP << 4)


@compiled
def pack_2_4(rows, values, positions):
    """`packing.pack_2_4` of rows (r, k); returns how many groups hold more than two entries."""
    faults = 0
    nibbles = np.empty(rows.shape[1] // 4, dtype=np.uint8)
    for i in range(rows.shape[0]):
        row, kept = rows[i], values[i]
        for group in range(row.shape[0] // 4):
            x0, x1, x2, x3 = row[4 * group], row[4 * group + 1], row[4 * group + 2], row[4 * group + 3]
            n0, n1, n2, n3 = np.uint8(x0 != 0), np.uint8(x1 != 0), np.uint8(x2 != 0), np.uint8(x3 != 0)
            both = n0 & n1
            neither = (n0 | n1) ^ _ONE
            last = n3 | neither
            kept[2 * group] = x0 if n0 else (x1 if n1 else x2)
            kept[2 * group + 1] = x1 if both else (x3 if last else x2)
            nibbles[group] = (n1 & ~n0) | (neither << 1) | ((both | last) << 2) | ((both ^ _ONE) << 3)
            faults += np.int64((n0 + n1 + n2 + n3) > 2)
        _join(nibbles, positions[i])
    return faults


@compiled
def clear_negative_zeros(rows, group):
    """`packing.clear_negative_zeros` in rows (r, k) themselves; returns how many were cleared."""
    count = 0
    zero = rows.dtype.type(0)
    sign = rows.dtype.type(1 << (8 * rows.itemsize - 1))
    for i in range(rows.shape[0]):
        row = rows[i]
        for start in range(0, row.shape[0], group):
            slots = group // 2
            for j in range(start, start + group):
                slots -= np.int64((row[j] != zero) & (row[j] != sign))
            for j in range(start, start + group):
                if row[j] == sign:
                    slots -= 1
                    if slots < 0:
                        row[j] = zero
                        count += 1
    return count


@njit(inline="always")
def spread_2_4(values, positions, nibbles, row):
    """Fill a row (k,) from its values (k/2,) and positions (ceil(k/8),), by way of `nibbles`, two a byte."""
    zero = row.dtype.type(0)
    for byte in range(positions.shape[0]):
        nibbles[2 * byte] = positions[byte] & _LOW
        nibbles[2 * byte + 1] = positions[byte] >> 4
    for group in range(row.shape[0] // 4):
        first, second = nibbles[group] & _THREE, nibbles[group] >> _TWO
        v0, v1 = values[2 * group], values[2 * group + 1]
        row[4 * group] = v0 if first == 0 else zero
        row[4 * group + 1] = v0 if first == 1 else (v1 if second == 1 else zero)
        row[4 * group + 2] = v0 if first == 2 else (v1 if second == 2 else zero)
        row[4 * group + 3] = v1 if second == 3 else zero


@njit(inline="always")
def expand_row(bits, values, row):
    """Fill a row (n,) from its bits (ceil(n/8),) and from `values`, which begin with its own; returns how many it has.

    A byte of the mask is taken at a time, without a branch while eight more values are left.
    """
    taken = 0
    whole = row.shape[0] // 8
    byte = 0
    while byte < whole and taken + 8 <= values.shape[0]:
        ones = np.intp(bits[byte])
        for bit in range(8):
            one = (ones >> bit) & 1
            row[8 * byte + bit] = values[taken] * one
            taken += one
        byte += 1
    for index in range(8 * byte, row.shape[0]):
        if (bits[index // 8] >> (index % 8)) & 1:
            row[index] = values[taken]
            taken += 1
        else:
            row[index] = 0
    return taken


@compiled
def unpack_2_4(values, positions, dense):
    """`packing.unpack_rows` into dense (r, k); returns how many nibbles are invalid."""
    faults = 0
    groups = dense.shape[1] // 4
    nibbles = np.empty(groups + groups % 2, dtype=np.uint8)
    for i in range(dense.shape[0]):
        spread_2_4(values[i], positions[i], nibbles, dense[i])
        for group in range(nibbles.shape[0]):
            faults += np.int64((nibbles[group] & _THREE) >= (nibbles[group] >> _TWO))
        if groups % 2:
            faults += np.int64(nibbles[groups] != EMPTY_GROUP)
    return faults


@compiled
def compress(elements, values):
    """Put the elements that are not zero at the start of `values`, which is as long; returns how many.

    Every element is written, and the index advances only where it is kept: there is no branch to mispredict.
    """
    count = 0
    for index in range(elements.size):
        element = elements[index]
        values[count] = element
        count += element != 0
    return count


@compiled
def expand(bits, values, elements):
    """`packing.expand` of rows (m, n)."""
    taken = 0
    for i in range(elements.shape[0]):
        taken += expand_row(bits[i], values[taken:], elements[i])


@compiled
def fill_tiles(units, meta):
    """`cutlass.fill_tiles`: units (rows, 4 C) into meta [C, R, 2, t, 8, units of 8 lines]."""
    panels, bands, _, tiles, _, width = meta.shape
    lines = width // 2
    for band in range(bands):
        for tile in range(tiles):
            first = (band * tiles + tile) * 8 * lines
            rows = units[first : first + 8 * lines]
            for panel in range(panels):
                for half in range(2):
                    column = 4 * panel + 2 * half
                    for r in range(8):  # a tile's rows are in the cache, its metadata is one run of memory
                        for line in range(lines):
                            slot = line // 2 * 4 + line % 2
                            row = rows[8 * line + r]
                            meta[panel, band, half, tile, r, slot] = row[column]
                            meta[panel, band, half, tile, r, slot + 2] = row[column + 1]


@compiled
def fill_sm90(positions, meta):
    """`cusparselt.fill_sm90`: positions (rows, k/8) into meta [R, C, 4, 8, 8]."""
    for block in range(meta.shape[0]):
        for sixteen in range(4):
            for r in range(8):
                upper = positions[64 * block + 16 * sixteen + r]
                lower = positions[64 * block + 16 * sixteen + 8 + r]
                for column in range(meta.shape[1]):
                    line = meta[block, column, sixteen, r]
                    for d in range(2):
                        for h in range(2):
                            first, second = upper[4 * column + 2 * d + h], lower[4 * column + 2 * d + h]
                            line[4 * h + d] = (first & 0x0F) | (second << 4)
                            line[4 * h + 2 + d] = (first >> 4) | (second & 0xF0)


@compiled
def gather_nibbles(meta, rows, groups, positions):
    """`packed.gather`: positions[i] from the nibbles of `meta` at rows[i] + groups."""
    nibbles = np.empty(groups.shape[0], dtype=np.uint8)
    for i in range(rows.shape[0]):
        for j in range(groups.shape[0]):
            at = rows[i] + groups[j]
            nibbles[j] = (meta[at >> 1] >> ((at & 1) << 2)) & 0xF
        _join(nibbles, positions[i])
