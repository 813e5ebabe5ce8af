"""Unpacking as compiled loops over one row after the other; elements travel as integers of their width."""

import numpy as np

from spp_fx.sparsity._compile import compiled


@compiled
def two_of_four(values, positions, out) -> None:  # pyright: ignore[reportMissingParameterType]
    """`unpack_2_4` on integer arrays."""
    rows, columns = out.shape
    for row in range(rows):
        for group in range(columns // 4):
            nibble = positions[row, group >> 1] >> ((group & 1) << 2)
            first, second = values[row, 2 * group], values[row, 2 * group + 1]
            a, b = nibble & 3, (nibble >> 2) & 3
            zero = first ^ first
            for lane in range(4):
                out[row, 4 * group + lane] = first if lane == a else (second if lane == b else zero)


@compiled
def bitmask(values, bits, out) -> None:  # pyright: ignore[reportMissingParameterType]
    """`unpack_bitmask` on integer arrays."""
    rows, columns = out.shape
    last = values.shape[0] - 1
    position = 0
    for row in range(rows):
        for column in range(columns):
            kept = np.int64((bits[row, column >> 3] >> (column & 7)) & 1)
            out[row, column] = values[min(position, last)] & -kept  # no branch: half of them would be missed
            position += kept
