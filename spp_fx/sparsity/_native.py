"""The kernels of a check that holds, as machine code that llvmlite made; numba has the rest.

The rest (transposes, places of violations, locators, groups across words) is loaded when it is first
called, because numba's import alone takes longer than looking at a gigabyte.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from spp_fx.native import Library, address
from spp_fx.sparsity._backend import Backend, Bytes, Elements, Words

if sys.byteorder != "little":
    raise ImportError("the compiled kernels read mask words as little-endian")

WIDTHS = (8, 16, 32, 64)  # bits of an element
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # those that divide a word

_ADDRESS, _COUNT, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
_SCAN_TYPE = ctypes.CFUNCTYPE(None, _ADDRESS, _COUNT, _WORD, _WORD, _WORD, _ADDRESS, _ADDRESS)
_READ_TYPE = ctypes.CFUNCTYPE(
    _COUNT, _ADDRESS, ctypes.c_int, _COUNT, _COUNT, _WORD, _WORD, _WORD, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS
)
_COUNT_TYPE = ctypes.CFUNCTYPE(_COUNT, _ADDRESS, _COUNT, _WORD)
_Found = ctypes.c_int64 * 3

LIBRARY = Library("spp_fx.sparsity._scan_ir", constants=("spp_fx.sparsity._native",))


def load_backend() -> Backend:
    """The compiled kernels.

    Raises:
        ImportError: the system lets no process run code that it made.
    """
    scans = {f"scan{width}": _SCAN_TYPE for width in WIDTHS}
    reads = {f"read{width}": _READ_TYPE for width in WIDTHS}
    counts = {f"count{group}": _COUNT_TYPE for group in GROUPS}
    kernels = _Kernels(LIBRARY.load(scans | reads | counts), _pread())
    return Backend(
        name="native",
        scan_elements=kernels.scan_elements,
        scan_descriptor=kernels.scan_descriptor if kernels.pread else None,
        count_over=kernels.count_over,
        first_over=_first_over,
        transpose_bits=_transpose_bits,
        locate=_locate,
    )


def _pread() -> int | None:
    """The address of the C library's `pread`, where files have 64-bit positions."""
    if sys.platform == "win32" or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).pread, _ADDRESS).value
    except (OSError, AttributeError):  # no C library to be found, as in a static program
        return None


@dataclass(frozen=True)
class _Kernels:
    functions: dict[str, Callable[..., Any]]
    pread: int | None

    def scan_elements(
        self, elements: Elements, magnitude: int, non_finite_from: int, non_finite_span: int, out: Bytes
    ) -> tuple[int, int, int]:
        rule = magnitude, non_finite_from, non_finite_span
        words, rest = divmod(elements.size, 64)
        ones, strange, first = self._scan_words(elements, words, rule, out)
        if rest:
            last = np.zeros(64, dtype=elements.dtype)
            last[:rest] = elements[words * 64 :]
            last_out = np.empty(8, dtype=np.uint8)
            last_ones, last_strange, last_first = self._scan_words(last, 1, rule, last_out)
            out[words * 8 : words * 8 + (rest + 7) // 8] = last_out[: (rest + 7) // 8]
            if first < 0 <= last_first:
                first = words * 64 + last_first
            ones, strange = ones + last_ones, strange + last_strange
        return ones, strange, first

    def _scan_words(
        self, elements: Elements, words: int, rule: tuple[int, int, int], out: Bytes
    ) -> tuple[int, int, int]:
        found = _Found()
        source = address(elements, words * 64 * elements.itemsize)
        self.functions[f"scan{8 * elements.itemsize}"](
            source, words, *rule, address(out, words * 8, write=True), found
        )
        ones, strange, first = found[:]
        return ones, strange, first

    def scan_descriptor(
        self, descriptor: int, position: int, itemsize: int, words: int,
        magnitude: int, non_finite_from: int, non_finite_span: int, buffer: Bytes, out: Bytes,
    ) -> tuple[int, int, int, int]:  # fmt: skip
        piece = buffer.size // (64 * itemsize)
        if piece < 1:
            raise ValueError(f"a buffer of {buffer.size} bytes holds no word of 64 elements")
        found = _Found()
        done = self.functions[f"read{8 * itemsize}"](
            self.pread, descriptor, position, words, magnitude, non_finite_from, non_finite_span,
            address(buffer, buffer.size, write=True), piece, address(out, words * 8, write=True), found,
        )  # fmt: skip
        ones, strange, first = found[:]
        return done, ones, strange, first

    def count_over(self, bits: Bytes, groups: int, group: int, kept: int) -> int:
        if group not in GROUPS:
            return _rest().count_over(bits, groups, group, kept)
        if kept >= group:  # the bias would be negative
            return 0
        count = self.functions[f"count{group}"]
        bias = (1 << (group - 1)) - 1 - kept
        words, rest = divmod(groups * group, 64)
        total: int = count(address(bits, words * 8), words, bias)
        if rest:
            tail = bits[words * 8 : words * 8 + (rest + 7) // 8].tobytes()
            word = int.from_bytes(tail, "little") & ((1 << rest) - 1)  # no ones: no group too full
            total += count(address(np.array([word], dtype=np.uint64), 8), 1, bias)
        return total


@cache
def _rest() -> ModuleType:
    try:
        from spp_fx.sparsity import _kernels as kernels
    except ImportError:
        from spp_fx.sparsity import _fallback as kernels
    return kernels


def _first_over(bits: Bytes, groups: int, group: int, kept: int) -> int:
    return _rest().first_over(bits, groups, group, kept)


def _transpose_bits(source: Bytes, target: Bytes, base: int, rows: int, columns: int) -> None:
    _rest().transpose_bits(source, target, base, rows, columns)


def _locate(bits: Bytes, rows: int, columns: int) -> Words:
    return _rest().locate(bits, rows, columns)
