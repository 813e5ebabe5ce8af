"""Values and bitmasks: which kernels run, compiled ones where numba is importable, plain numpy otherwise.

Elements are taken as unsigned integers of their width, so that no dtype is special: what is kept are the
elements whose bits are not all zero. A zero of negative sign is kept, and so is every payload.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Elements = NDArray[Any]


@dataclass(frozen=True)
class Kernels:
    """The loops over every weight.

    Attributes:
        name: "numba" or "numpy".
        compress: (elements, values) -> how many elements are not zero; they come first in `values`, which is
            as long as `elements` and holds anything after them.
        expand: (bits, values, elements): fill `elements` from the mask, LSB first, and the values. The mask
            must have as many ones among its first `elements.size` bits as there are values.
    """

    name: str
    compress: Callable[[Elements, Elements], int]
    expand: Callable[[Bytes, Elements, Elements], None]


@cache
def kernels() -> Kernels:
    """The fastest kernels this installation has."""
    try:
        from spp_fx.exporters import _bitmask_numba as found
    except ImportError:
        from spp_fx.exporters import _bitmask_numpy as found
    return found.KERNELS


def unsigned(data: Bytes, itemsize: int) -> Elements:
    """Bytes as little-endian elements of a width in bytes."""
    return data.view(np.dtype(f"<u{itemsize}"))


def ones(bits: Bytes) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
