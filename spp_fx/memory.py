"""Settings of glibc's malloc, which are of the whole process: for commands, not for functions of the library."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the options of mallopt, as glibc's malloc.h has them
_LARGEST_MMAP_THRESHOLD = 32 << 20
_LARGE = 1 << 20


def keep_freed_memory(nbytes: int) -> None:
    """Have each of malloc's arenas keep up to `nbytes` that are freed for what is allocated next.

    Arrays of some megabytes would go back to the system at once, and the next ones would get their pages one
    fault at a time. The thresholds no longer adapt afterwards.
    """
    _mallopt(_TRIM_THRESHOLD, nbytes)
    _mallopt(_MMAP_THRESHOLD, min(nbytes, _LARGEST_MMAP_THRESHOLD))


def return_large_blocks() -> None:
    """Let glibc give every freed block of a megabyte and more back to the system.

    It raises its threshold to the largest block it has seen freed, up to 32 MiB, and keeps smaller ones:
    activations of changing sizes then cut its heap into holes, which grow to hundreds of megabytes.
    """
    _mallopt(_MMAP_THRESHOLD, _LARGE)


def _mallopt(option: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none without a name
        return
    mallopt(option, value)
