"""The bitmask kernels, compiled by numba: without the interpreter's lock, without a branch an element."""

import sys

import numpy as np

from spp_fx.compiled import compiled
from spp_fx.exporters.bitmask import Bytes, Elements, Kernels

if sys.byteorder != "little":
    raise ImportError("the compiled kernels read elements as little-endian")


@compiled
def _compress(elements: Elements, values: Elements) -> int:
    """Every element is written, and the place moves on where it is kept: a mask is no news to predict."""
    count = 0
    for index in range(elements.size):
        element = elements[index]
        values[count] = element
        count += element != 0
    return count


@compiled
def _expand(bits: Bytes, values: Elements, elements: Elements) -> None:
    """A byte of mask at a time; without a branch while eight more values are sure to be there."""
    taken = 0
    whole = elements.size // 8
    byte = 0
    while byte < whole and taken + 8 <= values.size:
        ones = np.intp(bits[byte])
        for bit in range(8):
            one = (ones >> bit) & 1
            elements[8 * byte + bit] = values[taken] * one
            taken += one
        byte += 1
    for index in range(8 * byte, elements.size):
        if (bits[index // 8] >> (index % 8)) & 1:
            elements[index] = values[taken]
            taken += 1
        else:
            elements[index] = 0


def compress(elements: Elements, values: Elements) -> int:
    return int(_compress(elements, values))


def expand(bits: Bytes, values: Elements, elements: Elements) -> None:
    _expand(bits, values, elements)


KERNELS = Kernels("numba", compress, expand)
