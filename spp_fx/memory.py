"""What the C library does with memory that was freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the options of mallopt, as glibc's malloc.h has them
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory(nbytes: int) -> None:
    """Have this process keep up to `nbytes` that are freed for what it allocates next.

    Arrays of some megabytes would go back to the system at once, and the next ones would get their pages one
    fault at a time. For glibc, and a process of our own; elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none without a name
        return
    mallopt(_TRIM_THRESHOLD, nbytes)
    mallopt(_MMAP_THRESHOLD, min(nbytes, _LARGEST_MMAP_THRESHOLD))
