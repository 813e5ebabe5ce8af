"""Settings of glibc's malloc. They hold for the whole process: only commands set them, not the library."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the options of mallopt, as glibc's malloc.h has them
_LARGEST_MMAP_THRESHOLD = 32 << 20
_LARGE = 1 << 20


def keep_freed_memory(nbytes: int) -> None:
    """Let each arena of malloc keep up to `nbytes` of freed memory for the next allocations.

    By default arrays of some megabytes are unmapped at once, and the next ones cost a page fault per page. This also
    stops glibc from adapting its thresholds.
    """
    _mallopt(_TRIM_THRESHOLD, nbytes)
    _mallopt(_MMAP_THRESHOLD, min(nbytes, _LARGEST_MMAP_THRESHOLD))


def return_large_blocks() -> None:
    """Return every freed block of at least a megabyte to the system.

    By default glibc raises this threshold to the largest freed block, up to 32 MiB: activations of changing sizes then
    fragment its heap by hundreds of megabytes.
    """
    _mallopt(_MMAP_THRESHOLD, _LARGE)


def _mallopt(option: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(option, value)
