"""Keeping a process as small as what it holds."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the options of mallopt, as glibc's malloc.h has them
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory(nbytes: int) -> None:
    """Have each of malloc's arenas keep up to `nbytes` that are freed for what is allocated next.

    Arrays of some megabytes would go back to the system at once, and the next ones would get their pages one
    fault at a time. For glibc, whose thresholds no longer adapt afterwards; elsewhere nothing changes. It is
    a setting of the whole process, so for a command and not for a function of the library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none without a name
        return
    mallopt(_TRIM_THRESHOLD, nbytes)
    mallopt(_MMAP_THRESHOLD, min(nbytes, _LARGEST_MMAP_THRESHOLD))


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
