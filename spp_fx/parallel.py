"""A map over threads with results in order; torch's own threads; progress callbacks."""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

Tick = Callable[[str, int], None]
"""A progress callback: called with what was done and how many bytes it covered."""


def no_tick(what: str, nbytes: int) -> None:
    """Show nothing."""


Item = TypeVar("Item")
Made = TypeVar("Made")

_MAX_THREADS = 8  # with more, reading and hashing in order takes the time
_own = threading.local()


def cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """How many threads the caller may keep busy: one per CPU, at most 8; in a job, its share of them."""
    share: int | None = getattr(_own, "share", None)
    return share if share is not None else min(cpu_count(), _MAX_THREADS)


class _StoppedError(Exception):
    """The results of this job are no longer needed."""


@contextmanager
def sharing(threads: int, stop: threading.Event | None = None) -> Generator[None, None, None]:
    """Within the block, `thread_count` of this thread is `threads`, and `in_order` ends once `stop` is set."""
    before = getattr(_own, "share", None), getattr(_own, "stop", None)
    _own.share, _own.stop = threads, stop
    try:
        yield
    finally:
        _own.share, _own.stop = before


def in_order(
    make: Callable[[Item], Made], items: Iterable[Item], jobs: int | None = None, *, ahead: int | None = None
) -> Iterator[Made]:
    """`map` on threads, in the order of the items.

    Jobs have the caller's context variables, and their share of its threads as `thread_count`. The first exception is
    raised in place of its result. No item is begun after that, or after the iterator is closed; the same holds for an
    `in_order` within a job.

    Args:
        make: called once for each item, on any thread.
        items: taken one by one, on the caller's thread.
        jobs: how many run at once; `thread_count()` by default. 1 runs all on the caller's thread.
        ahead: how many results may wait to be taken; two per job by default.
    """
    threads = thread_count()
    jobs = threads if jobs is None else jobs
    outer: threading.Event | None = getattr(_own, "stop", None)
    if jobs <= 1:
        for item in items:
            _go_on(outer)
            yield make(item)
        return
    share, stop = max(1, threads // jobs), threading.Event()
    ahead = 2 * jobs if ahead is None else ahead

    def job(item: Item) -> Made:
        with sharing(share, stop):
            return make(item)

    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="spp-fx")
    try:
        for item in items:
            waiting.append(pool.submit(copy_context().run, job, item))
            if len(waiting) > ahead:
                _go_on(outer)
                yield waiting.popleft().result()
        while waiting:
            _go_on(outer)
            yield waiting.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _go_on(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise _StoppedError


def on_torch_threads(function: Any, argument: int | None, threads: int) -> None:
    """Call a C function, (void *) -> void, on so many threads at once, of which the caller's is one.

    The threads are OpenMP's, as torch's own: between products these wait busily, and would take turns with others.
    Where torch has another OpenMP, they are Python's.

    Args:
        function: a `ctypes.CFUNCTYPE(None, ctypes.c_void_p)`, which shares out its work by itself.
        argument: an address.
    """
    parallel = _openmp() if threads > 1 else None
    if parallel is not None:
        parallel(function, argument, threads, 0)
    elif threads > 1:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(function, argument) for _ in range(threads - 1)]
            function(argument)
            for other in others:
                other.result()
    else:
        function(argument)


@cache
def _openmp() -> Any:
    """OpenMP's call that runs a function with an argument on its threads; None if torch has another, or none."""
    try:
        parallel = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):  # not loaded; or no such flag on this system
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
