"""Keeping a process as small as what it holds."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 1 << 20


def return_large_blocks() -> None:
    """Let glibc give every freed block of a megabyte and more back to the system.

    It raises its threshold to the largest block it has seen freed, up to 32 MiB, and keeps smaller ones:
    activations of changing sizes then cut its heap into holes, which grow to hundreds of megabytes.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
