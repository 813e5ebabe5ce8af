"""The bitmask kernels in plain numpy: the definition the compiled ones are held to, and the way without numba."""

import numpy as np

from spp_fx.exporters.bitmask import Bytes, Elements, Kernels


def compress(elements: Elements, values: Elements) -> int:
    kept = elements[elements != 0]
    values[: kept.size] = kept
    return kept.size


def expand(bits: Bytes, values: Elements, elements: Elements) -> None:
    ones = np.unpackbits(bits, count=elements.size, bitorder="little").view(np.bool_)
    elements[:] = 0
    elements[ones] = values


KERNELS = Kernels("numpy", compress, expand)
