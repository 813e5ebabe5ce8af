"""A weight file written again at the same offsets: some spans of bytes changed, the others copied in the kernel.

Spans are independent of one another, so that reading, changing and writing overlap on every core: each is
read, changed and written by one thread, at the place where it was.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from spp_fx.checkpoint.shard import Shard
from spp_fx.checkpoint.stream import copy_bytes, naming, new_file
from spp_fx.errors import FormatError
from spp_fx.parallel import in_order

Bytes = NDArray[np.uint8]
Made = TypeVar("Made")

SPAN = 1 << 20
"""Bytes that a change should be asked for at once: with its result they stay in a core's own cache."""

_COPY = 64 << 20  # bytes of one copy: large against a system call, small against a file


@dataclass(frozen=True)
class Change(Generic[Made]):
    """Bytes start <= i < stop of a file, and what fills the buffer that takes their place.

    Attributes:
        make: called with the stored bytes and a buffer of the same length, on any thread; what it returns
            (never None) tells what it did.
    """

    start: int
    stop: int
    make: Callable[[Bytes, Bytes], Made]


def rewrite(source: Shard, target: Path, changes: Iterable[Change[Made]]) -> Iterator[Made]:
    """Write a shard again with the same header and the same offsets.

    Args:
        source: the shard to start from; it is not modified.
        target: a file that does not exist yet. It is whole when the iterator is exhausted, not yet fsynced;
            on an error, or when the iterator is closed early, it is removed.
        changes: in the order of their places, without overlaps; bytes between them are copied.

    Yields:
        What each change made, in order.

    Raises:
        UsageError: `target` exists.
        FormatError: `source` shrank.
        SppFxError: the disk is full or refuses to be written.
    """
    size = source.header.data_end
    with new_file(target, sync=False) as out, open(source.path, "rb", buffering=0) as original:
        _reserve(out.fileno(), size)
        buffers = threading.local()

        def run(span: "_Span[Made]") -> Made | None:
            start, stop, change = span
            if change is None:
                copy_bytes(original, out, start, stop, source.path)
                return None
            before, after = _buffers(buffers, stop - start)
            with naming(source.path):
                _fill(original.fileno(), before, start, source.path)
            made = change.make(before, after)
            _drain(out.fileno(), after, start)
            return made

        for made in in_order(run, _cover(changes, size)):
            if made is not None:
                yield made


_Span: TypeAlias = "tuple[int, int, Change[Made] | None]"


def _cover(changes: Iterable[Change[Made]], size: int) -> "Iterator[_Span[Made]]":
    """Spans that make up the whole file: the changes, and copies of what lies between them."""
    done = 0
    for change in changes:
        yield from _copies(done, change.start)
        yield change.start, change.stop, change
        done = change.stop
    yield from _copies(done, size)


def _copies(start: int, stop: int) -> Iterator[tuple[int, int, None]]:
    return ((at, min(at + _COPY, stop), None) for at in range(start, stop, _COPY))


def _reserve(file: int, size: int) -> None:
    """Take the room now, where the file system can: a full disk is known, and no file is scattered."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _buffers(held: threading.local, count: int) -> tuple[Bytes, Bytes]:
    """Two buffers of the calling thread: pages that are new to it would cost as much as reading them."""
    pair: tuple[Bytes, Bytes] | None = getattr(held, "pair", None)
    if pair is None or pair[0].size < count:
        held.pair = pair = (np.empty(count, np.uint8), np.empty(count, np.uint8))
    return pair[0][:count], pair[1][:count]


def _fill(file: int, buffer: Bytes, start: int, path: Path) -> None:
    view, done = buffer.data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise FormatError(f"{path}: shrank while it was read; get it again")
        done += count


def _drain(file: int, buffer: Bytes, start: int) -> None:
    view, done = buffer.data, 0
    while done < len(view):
        done += os.pwrite(file, view[done:], start + done)
