"""The memory that some work takes, measured in the test's own process."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises above its start while `work` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, or it would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
