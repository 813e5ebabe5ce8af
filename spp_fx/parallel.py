"""Threads over independent pieces of work: results in order, few of them waiting, no thread too many."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

_MAX_THREADS = 8  # past this, reading and hashing in order is what takes the time
_own = threading.local()


def cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """How many threads the caller may keep busy: the CPUs at hand, at most 8; in a job, its share of them."""
    share: int | None = getattr(_own, "share", None)
    return share if share is not None else min(cpu_count(), _MAX_THREADS)


@contextmanager
def sharing(threads: int) -> Generator[None, None, None]:
    """Within the block, `thread_count` of this thread is `threads`."""
    before: int | None = getattr(_own, "share", None)
    _own.share = threads
    try:
        yield
    finally:
        _own.share = before


def in_order(make: Callable[[Item], Made], items: Iterable[Item], jobs: int | None = None) -> Iterator[Made]:
    """`map` on threads, in the order of the items.

    No more than two results a job wait for the one who takes them. What a job calls sees its share of the
    threads in `thread_count`. The first exception is raised where its result would have come; items that
    have not begun by then, or when the iterator is closed, are not begun.

    Args:
        make: called once for each item, on any thread.
        items: taken one by one, on the caller's thread.
        jobs: how many run at once; `thread_count()` by default. 1 runs all on the caller's thread.
    """
    threads = thread_count()
    jobs = threads if jobs is None else jobs
    if jobs <= 1:
        yield from map(make, items)
        return
    share = max(1, threads // jobs)

    def job(item: Item) -> Made:
        with sharing(share):
            return make(item)

    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="spp-fx")
    try:
        for item in items:
            waiting.append(pool.submit(job, item))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
