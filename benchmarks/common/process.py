"""A command in a process of its own: how long it took, and the most memory that it held."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a finished process took."""

    seconds: float
    peak_mb: float
    output: str


def run_spp_fx(*arguments: Any) -> Run:
    """`spp-fx` with these arguments; its stdout is kept. Ends this program where it fails."""
    return run_python("-m", "spp_fx", *arguments)


def run_python(*arguments: Any) -> Run:
    """This Python with these arguments, as `run_spp_fx`."""
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as watching:
        peak = watching.submit(_peak, process)
        output = process.stdout.read()
        status = process.wait()
        seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)}: failed with status {status}")
    return Run(seconds, peak.result(), output)


def _peak(process: subprocess.Popen[str]) -> float:
    """The largest resident set of a process, in MB, as the system notes it since the program was loaded.

    wait4 would tell a number that has this program in it, too: what a process was before it loaded another.
    """
    peak = 0.0
    while process.returncode is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max(peak, *(int(mark) * 1024 / 1e6 for mark in marks), 0.0)
        time.sleep(0.01)
    return peak
