"""How many threads share the work on one weight."""

import os

_MAX_THREADS = 8  # past this, hashing the mask in order is what takes the time


def thread_count() -> int:
    """The CPUs this process may use, at most eight."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, _MAX_THREADS)
