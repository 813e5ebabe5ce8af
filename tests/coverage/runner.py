"""Probes of many types, each in a process of its own with limits, kept in a file of JSON lines."""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from tests.coverage.models import TASKS, types_of
from tests.coverage.probe import COLUMNS, TOO_LONG, Row, probe

SECONDS = 120
"""CPU time of a type."""
MEMORY = 12 * 2**30
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


def digest() -> str:
    """Of everything that a row depends on: libraries and sources."""
    found = blake2b(digest_size=8)
    for library in (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ):
        found.update(f"{library} {version(library)}\n".encode())
    for folder in ("spp_fx", "tests/coverage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def third() -> list[tuple[str, str]]:
    """A fixed third of all types, each for one of the tasks that it is registered for: what every submission probes."""
    tasks: dict[str, list[str]] = {}
    for task in TASKS:
        for model_type in types_of(task):
            tasks.setdefault(model_type, []).append(task)
    chosen: list[tuple[str, str]] = []
    for model_type, own in sorted(tasks.items()):
        number = int.from_bytes(blake2b(model_type.encode(), digest_size=4).digest(), "big")
        if number % 3 == 0:
            chosen.append((own[number // 3 % len(own)], model_type))
    return chosen


def kept(path: Path) -> dict[tuple[str, str], tuple[str, Row]]:
    """The rows of a file, the last of each type, with the digest of each."""
    rows: dict[tuple[str, str], tuple[str, Row]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        row = Row(**entry["row"])
        rows[row.task, row.model_type] = (entry["digest"], row)
    return rows


def keep(path: Path, row: Row, source: str, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"digest": source, "seconds": round(seconds, 1), "row": asdict(row)}) + "\n")


def run(
    wanted: Sequence[tuple[str, str]], jobs: int, *, seconds: int = SECONDS, without: Sequence[str] = ()
) -> Iterator[tuple[Row, float]]:
    """Rows of types with the CPU time of each, in the order in which they end; `jobs` processes at a time."""
    waiting, running = list(wanted), dict[int, tuple[tuple[str, str], float, Path]]()
    with tempfile.TemporaryDirectory(prefix="spp-fx-rows-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                each = waiting.pop(0)
                path = Path(folder) / "-".join(each)
                running[_start(each, path, seconds, without)] = each, time.monotonic(), path
            for pid, (each, start, path) in list(running.items()):
                if time.monotonic() - start > 20 * seconds:  # it waits for something
                    os.kill(pid, signal.SIGKILL)
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                    yield _row(each, path, status, seconds), used.ru_utime + used.ru_stime
            time.sleep(0.05)


def _start(each: tuple[str, str], path: Path, seconds: int, without: Sequence[str]) -> int:
    """Fork: the libraries are imported once."""
    pid = os.fork()
    if pid:
        return pid
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        probe(*each, lambda row: _write(path, row), without=without)
    finally:
        os._exit(0 if sys.exception() is None else 1)


def _write(path: Path, row: Row) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(row)))
    temporary.replace(path)


def _row(each: tuple[str, str], path: Path, status: int, seconds: int) -> Row:
    row = Row(**json.loads(path.read_text())) if path.exists() else Row(*each, dict.fromkeys(COLUMNS, "-"))
    if status:
        ended = os.waitstatus_to_exitcode(status)
        why = f"the process ended with {ended}" if ended >= 0 else f"ended by {signal.Signals(-ended).name}"
        if -ended in (signal.SIGXCPU, signal.SIGKILL):
            why = f"takes more than {seconds} s of CPU time"
        name = next((name for name, cell in row.cells.items() if cell == TOO_LONG), "trace")
        row.cells[name] = why
    return row


def wanted(tasks: Collection[str], names: Collection[str]) -> list[tuple[str, str]]:
    """The types of tasks: those of the names, or all."""
    return [(t, each) for t in tasks for each in types_of(t) if not names or each in names]
