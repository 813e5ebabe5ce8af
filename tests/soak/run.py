"""One run of a command in a process of its own, that can be killed at a moment or at a call."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

CALLS = ("fsync", "write", "pwrite", "copy_file_range", "ftruncate", "truncate")
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "ctypes.dlsym")
PATIENCE = 1800.0


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: its exit code, negative where a signal ended it.
        seconds: from the moment it began to work on the output, or from its start if it never did.
        began: seconds from its start until then.
    """

    code: int
    seconds: float
    began: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def fork_server() -> ForkServerContext:
    """Processes that begin with everything imported: nearly all their time is work on files."""
    context = get_context("forkserver")
    verbs = [f"spp_fx.verbs.{verb}" for verb in ("merge", "prune", "export", "verify")]
    formats = [f"spp_fx.exporters.{module}" for module in ("cutlass", "sparse_bitmask", "plain")]
    context.set_forkserver_preload([*verbs, *formats, "spp_fx.cli", "tests.soak.run"])
    return context


def run_forked(
    server: ForkServerContext, words: list[str], store: Path, after: float | None = None, at_call: int = 0
) -> Ended:
    """Run a command line in a fork of the server.

    Args:
        words: what follows `spp-fx`.
        store: the folder whose appearance says that the work begins.
        after: seconds of work after which it is killed.
        at_call: which call that changes files it does not live to see the end of; 0 for none.
    """
    process = server.Process(target=_child, args=(words, at_call))
    process.start()
    return _watch(lambda: process.exitcode, process.kill, store, after)


def run_python(words: list[str], store: Path, after: float | None = None) -> Ended:
    """Run a command line as a user does, and kill it after so many seconds from its very start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "spp_fx", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return _watch(process.poll, process.kill, store, after, from_start=True)


def _watch(
    code: Callable[[], int | None],
    kill: Callable[[], None],
    store: Path,
    after: float | None,
    *,
    from_start: bool = False,
) -> Ended:
    start = time.monotonic()
    began = start if from_start else None
    while (ended := code()) is None:
        now = time.monotonic()
        if began is None and store.exists():
            began = now
        if began is not None and after is not None and now - began >= after:
            kill()
            after = None
        if now - start > PATIENCE:
            kill()
            raise TimeoutError(f"a run took more than {PATIENCE:.0f} s")
        time.sleep(0.0005)
    began = start if began is None else began
    return Ended(ended, time.monotonic() - began, began - start)


def run_counted(server: ForkServerContext, words: list[str], store: Path) -> tuple[Ended, int]:
    """Run a command line undisturbed; also says how many calls that change files it made."""
    reader, writer = server.Pipe(duplex=False)
    process = server.Process(target=_child, args=(words, -1, writer))
    process.start()
    writer.close()
    ended = _watch(lambda: process.exitcode, process.kill, store, None)
    return ended, int(reader.recv())


def _child(words: list[str], at_call: int, report: Any = None) -> None:
    import torch

    from spp_fx.cli import run

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # it shares the cores with other tests
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at_call:
            os.kill(os.getpid(), signal.SIGKILL)

    if at_call:
        _hook(count)
    code = run(words)
    if report is not None:
        report.send(seen)
    sys.stderr.flush()
    os._exit(code)  # a fork has no business in the parent's exit handlers


def _hook(count: Callable[[], None]) -> None:
    """Call `count` before, and for calls of `os` also after, whatever changes files by way of Python."""

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count()
            result = real(*arguments, **named)
            count()
            return result

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    from spp_fx.storage import workspace

    workspace._exchange = counted(workspace._exchange)
    sys.addaudithook(lambda event, _: count() if event in EVENTS else None)
