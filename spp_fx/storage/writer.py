"""Writing safetensors files and model folders as a stream: memory holds one tensor, or one block of rows."""

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError, UsageError, WriteError
from spp_fx.parallel import in_order
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import (
    BITS,
    LAYOUT_RANK,
    MAX_HEADER_BYTES,
    Header,
    Shard,
    TensorInfo,
    read_at,
    read_header,
    stored_nbytes,
    torch_dtype,
    torch_shape,
)
from spp_fx.storage.strict_json import shown
from spp_fx.storage.workspace import Workspace

if TYPE_CHECKING:
    import torch


Bytes = NDArray[np.uint8]
Made = TypeVar("Made")

Content: TypeAlias = "torch.Tensor | Iterable[torch.Tensor]"
"""A tensor, or its consecutive blocks of rows along the first dimension."""

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype ('BF16') and stored shape of a tensor to be written."""

SPAN = 1 << 20
"""Bytes that a change should cover: with its result they stay in the cache of a core."""

_COPY = 64 << 20  # bytes that one task of `rewrite` copies
_BUFFER = 8 << 20  # bytes of one read where the kernel does not copy
_NO_FAST_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)


def rewrite_shard(source: Shard, target: Path, replace: "Callable[[TensorInfo], Content | None]") -> None:
    """Copy a shard, header included, with some of its tensors replaced; on any error `target` is removed.

    Args:
        source: it is not modified.
        target: a file that does not exist yet.
        replace: called once for each tensor, in the order of the file; returns what replaces it, or None to copy
            the stored bytes.

    Raises:
        UsageError: `target` exists.
        FormatError: a replacement of another dtype or shape; `source` shrank.
        WriteError: the disk is full or fails.
    """
    with new_file(target) as out, open(source.path, "rb", buffering=0) as original:
        write_all(out, memoryview(source.header.raw))
        done = source.header.data_start
        for info in source.header.tensors.values():
            content = replace(info)
            if content is not None:
                copy_bytes(original, out, done, info.start, source.path)
                out.seek(info.start)
                write_content(out, content, info.dtype, info.shape, f"{target}: tensor {shown(info.name)}")
                done = info.end
        copy_bytes(original, out, done, source.header.data_end, source.path)


def write_safetensors(
    target: Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[str], Content],
    metadata: Mapping[str, str] | None = None,
) -> Header:
    """Write a new file with the layout of the reference implementation; on any error `target` is removed.

    Args:
        target: a file that does not exist yet.
        specs: name, dtype and shape of every tensor, in any order.
        produce: returns the content of a tensor by its name; called once each, in the order of the file.
        metadata: text for `__metadata__`; transformers expects {"format": "pt"}.

    Returns:
        The header, read back from the file.

    Raises:
        UsageError: `target` exists.
        FormatError: a name twice, an unknown dtype, or content of another dtype or shape than in `specs`.
        WriteError: the disk is full or fails.
    """
    ordered = layout(specs, target)
    raw = header_bytes(ordered, dict(sorted((metadata or {}).items())), target)
    with new_file(target) as out:
        write_all(out, memoryview(raw))
        for name, dtype, shape in ordered:
            write_content(out, produce(name), dtype, shape, f"{target}: tensor {shown(name)}")
    return read_header(target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file to a path that does not exist yet, and fsync it; missing folders are created.

    Raises:
        UsageError: `target` exists.
        WriteError: a file cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as out, open(source, "rb", buffering=0) as original:
        copy_bytes(original, out, 0, os.fstat(original.fileno()).st_size, source)


@contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """Let an OSError of the block name this file if it names none, as calls on descriptors do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(target: Path, *, sync: bool = True) -> Generator[FileIO, None, None]:
    """A new unbuffered file; fsynced at the end unless `sync` is false, removed when anything fails.

    Raises:
        UsageError: `target` exists.
        WriteError: an OSError of the block, or of opening or syncing the file.
    """
    try:
        file = open(target, "xb", buffering=0)  # noqa: SIM115 (closed below)
    except FileExistsError:
        raise UsageError(f"{target}: exists; it is not overwritten") from None
    except OSError as error:
        raise WriteError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        with file:
            yield file
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        target.unlink(missing_ok=True)
        where = error.filename if error.filename is not None else target
        raise WriteError(f"{where}: failed while {target} was written ({error.strerror})") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def write_all(out: FileIO, data: memoryview) -> None:
    """Append all of `data` to an unbuffered file."""
    done = 0
    while done < len(data):  # one call writes at most 2 GiB
        done += out.write(data[done:])


def write_at(descriptor: int, position: int, data: memoryview) -> None:
    """Write all of `data` at a position of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def copy_bytes(source: FileIO, out: FileIO, start: int, stop: int, path: Path) -> None:
    """Copy bytes start <= i < stop of `source` to the same place in `out`, inside the kernel where it can.

    Neither file's position is used, so several threads may copy at once.

    Args:
        path: of `source`, for errors.

    Raises:
        FormatError: `source` ends before `stop`.
    """
    fast = hasattr(os, "copy_file_range")
    while start < stop:
        copied = 0
        if fast:
            try:
                copied = os.copy_file_range(source.fileno(), out.fileno(), stop - start, start, start)
            except OSError as error:
                if error.errno not in _NO_FAST_COPY:
                    raise
            fast = copied > 0  # 0: not supported, which some file systems do not report as an error
        if not copied:
            with naming(path):
                data = os.pread(source.fileno(), min(_BUFFER, stop - start), start)
            if not data:
                raise FormatError(f"{path}: shrank while it was copied; get it again")
            write_at(out.fileno(), start, memoryview(data))
            copied = len(data)
        start += copied


def write_content(out: FileIO, content: Content, dtype: str, shape: tuple[int, ...], where: str) -> None:
    """Append the content of a tensor; FormatError, which begins with `where`, if it is not of dtype and shape."""
    import torch

    try:
        want, expected = torch_dtype(dtype), torch_shape(dtype, shape)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    rows, all_rows = 0, expected[0] if expected else 1
    for block in [content] if isinstance(content, torch.Tensor) else content:
        if block.dtype != want:
            raise FormatError(f"{where}: needs {want}, was given {block.dtype}")
        rows += block.shape[0] if block.ndim else 1
        if block.ndim != len(expected) or block.shape[1:] != expected[1:] or rows > all_rows:
            raise FormatError(f"{where}: rows of shape {list(block.shape)} do not fit in {list(expected)}")
        if block.numel():
            plain = block.detach().cpu().resolve_conj().resolve_neg().contiguous()
            write_all(out, plain.reshape(-1).view(torch.uint8).numpy().data)
        del block  # before the next one is made
    if rows != all_rows:
        raise FormatError(f"{where}: was given {rows} rows, needs shape {list(expected)}")


def layout(specs: Iterable[TensorSpec], target: Path) -> list[TensorSpec]:
    """`specs` in the order of the reference implementation: by dtype, widest first, then by name.

    Raises:
        FormatError: a name twice, or an unknown dtype.
    """
    ordered = list(specs)
    names: set[str] = set()
    for name, dtype, _ in ordered:
        where = f"{target}: tensor {shown(name)}"
        if name in names or name == "__metadata__":
            reason = "is given twice" if name in names else "has a name that the format reserves"
            raise FormatError(f"{where}: {reason}")
        if dtype not in BITS:
            raise FormatError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(BITS)}")
        names.add(name)
    ordered.sort(key=lambda spec: (-LAYOUT_RANK[spec[1]], spec[0]))
    return ordered


def header_bytes(ordered: list[TensorSpec], metadata: Mapping[str, str], target: Path) -> bytes:
    """The bytes of a file before its first tensor.

    Raises:
        FormatError: a name is not Unicode text, or the header is longer than the format allows.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    position = 0
    for name, dtype, shape in ordered:
        end = position + stored_nbytes(dtype, shape, f"{target}: tensor {shown(name)}")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{target}: a name or metadata is not Unicode text ({error})") from None
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{target}: its header takes {len(text)} bytes, the limit is {MAX_HEADER_BYTES}")
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Change(Generic[Made]):
    """Bytes start <= i < stop of a file, and what replaces them.

    Attributes:
        make: called with the stored bytes and a buffer of the same length to fill, on any thread; its result, not
            None, is a report.
    """

    start: int
    stop: int
    make: Callable[[Bytes, Bytes], Made]


def rewrite(source: Shard, target: Path, changes: Iterable[Change[Made]]) -> Iterator[Made]:
    """Copy a shard with some of its bytes changed, on all cores: one thread reads, changes and writes a span.

    Args:
        source: it is not modified.
        target: a file that does not exist yet. It is whole, but not fsynced, when the iterator is exhausted; it is
            removed on an error, or when the iterator is closed early.
        changes: in the order of the file, without overlaps; bytes between them are copied.

    Yields:
        The report of each change, in order.

    Raises:
        UsageError: `target` exists.
        FormatError: `source` shrank.
        WriteError: the disk is full or fails.
    """
    size = source.header.data_end
    with new_file(target, sync=False) as out, open(source.path, "rb", buffering=0) as original:
        _reserve(out.fileno(), size)
        buffers = threading.local()

        def run(span: tuple[int, int, Change[Made] | None]) -> Made | None:
            start, stop, change = span
            if change is None:
                copy_bytes(original, out, start, stop, source.path)
                return None
            before, after = _buffers(buffers, stop - start)
            with naming(source.path):
                if read_at(original.fileno(), start, before.data) < before.size:
                    raise FormatError(f"{source.path}: shrank while it was read; get it again")
            made = change.make(before, after)
            write_at(out.fileno(), start, after.data)
            return made

        for made in in_order(run, _cover(changes, size)):
            if made is not None:
                yield made


def _cover(changes: Iterable[Change[Made]], size: int) -> Iterator[tuple[int, int, Change[Made] | None]]:
    """Spans that make up the whole file: the changes, and copies of the bytes between them."""
    done = 0
    for start, stop, change in chain(((c.start, c.stop, c) for c in changes), [(size, size, None)]):
        yield from ((at, min(at + _COPY, start), None) for at in range(done, start, _COPY))
        if change is not None:
            yield start, stop, change
        done = stop


def _reserve(file: int, size: int) -> None:
    """Allocate the file now, where the file system can: a full disk is found early, and files stay contiguous."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _buffers(held: threading.local, count: int) -> tuple[Bytes, Bytes]:
    """Two buffers of the calling thread: page faults of new ones would cost as much as reading."""
    pair: tuple[Bytes, Bytes] | None = getattr(held, "pair", None)
    if pair is None or pair[0].size < count:
        held.pair = pair = (np.empty(count, np.uint8), np.empty(count, np.uint8))
    return pair[0][:count], pair[1][:count]


def copy_others(source: ModelFolder, target: Path, skip: Collection[str] = ()) -> None:
    """Copy configuration, tokenizer and index of a model to an existing folder.

    Args:
        skip: relative paths ('README.md') of files that are not copied.
    """
    names = [path.as_posix() for path in source.other_files() if path.as_posix() not in skip]
    for name in [*names, *([source.index] if source.index is not None else [])]:
        copy_file(source.path / name, target / name)


def write_shards(
    source: ModelFolder,
    target: Path,
    write: Callable[[Shard, Path], dict[str, Any]],
    work: Workspace | None = None,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Write a file for each weight file of a model, except for those that an earlier run finished.

    Args:
        source: a folder opened with its weights.
        target: for the files; the folder of `work`, or one in it.
        write: writes the file of a shard to a path that does not exist yet; returns its facts, JSON.
        work: knows what earlier runs finished; without one, every file is written.
        names: of the files; those of the model's by default.

    Returns:
        The facts of each file, in the order of `source.shards`.
    """
    every: list[dict[str, Any]] = []
    for shard, own in zip(source.shards, names or [shard.name for shard in source.shards], strict=True):
        file = within(target, own)
        name = "" if work is None else file.relative_to(work.folder).as_posix()
        facts = None if work is None else work.finished(name)
        if facts is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = write(shard, file)
            if work is not None:
                work.finish(name, **facts)
        every.append(facts)
    return every
