"""A command in a process of its own: how long it took, and the most memory that it held."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
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
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"{' '.join(command)}: failed with status {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6, output)
