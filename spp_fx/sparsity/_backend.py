"""Which kernels run: compiled ones where llvmlite is importable, plain numpy otherwise.

Loaded lazily, so that a command which never looks at zeros does not pay for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Elements = NDArray[Any]


@dataclass(frozen=True)
class Backend:
    """The kernels that touch every weight or every mask bit.

    Attributes:
        name: "native" or "numpy".
        scan_elements: (elements, magnitude, non_finite_from, non_finite_span, out) ->
            (non-zeros, non-finites, index of the first non-finite or -1). `elements` is a 1-D unsigned
            array, `out` receives ceil(len / 8) mask bytes, LSB first.
        scan_descriptor: (descriptor, position, itemsize, words, magnitude, non_finite_from, non_finite_span,
            buffer, out) -> (words done, and of those what `scan_elements` returns). Reads 64 * words elements
            from a byte of an open file, a buffer at a time, without the interpreter's lock; stops early at a
            read that is not whole. None where there is no such kernel.
        count_over: (bits, groups, group, kept) -> how many of the first `groups` groups of `group` bits
            hold more than `kept` ones.
        first_over: the same arguments -> the first such group, or -1.
        transpose_bits: (source, target, base, rows, columns): the (rows, columns) bit matrix that starts
            at bit `base` of `source` is or-ed, transposed, into `target` at the same base.
        locate: (bits, rows, columns) -> (8,) uint64: bucket r % 8 holds the XOR over the ones of row r
            of (linear index + 1).
    """

    name: str
    scan_elements: Callable[[Elements, int, int, int, Bytes], tuple[int, int, int]]
    scan_descriptor: (
        Callable[[int, int, int, int, int, int, int, Bytes, Bytes], tuple[int, int, int, int]] | None
    )
    count_over: Callable[[Bytes, int, int, int], int]
    first_over: Callable[[Bytes, int, int, int], int]
    transpose_bits: Callable[[Bytes, Bytes, int, int, int], None]
    locate: Callable[[Bytes, int, int], Words]


@cache
def backend() -> Backend:
    """The fastest backend this installation has."""
    try:
        from spp_fx.sparsity._native import load_backend

        return load_backend()
    except ImportError:
        from spp_fx.sparsity._fallback import BACKEND

        return BACKEND
