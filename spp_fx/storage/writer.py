"""Writing safetensors files and model folders as a stream, one tensor or one block of rows in memory at a time."""

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
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
"""Bytes that a change should cover: with its result they stay in a core's own cache."""

_COPY = 64 << 20  # bytes of one copy in `rewrite`: large against a system call, small against a file
_COPY_BYTES = 8 * 2**20  # bytes of one copy by hand
_NO_FAST_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)


def rewrite_shard(source: Shard, target: Path, replace: "Callable[[TensorInfo], Content | None]") -> None:
    """Write a shard with the header of `source` byte for byte, and some of its tensors replaced.

    Args:
        source: the shard to start from; it is not modified.
        target: a file that does not exist yet.
        replace: called once for each tensor in file order. None copies the stored bytes (the tensor is
            never decoded); otherwise a tensor, or an iterable of row blocks made one at a time, that replaces it.
            It reads what it needs from `source` itself.

    Raises:
        UsageError: `target` exists.
        FormatError: a replacement of another dtype or shape; `source` shrank.
        SppFxError: the disk is full or refuses to be written.

    On any error `target` is removed.
    """
    with new_file(target) as out, open(source.path, "rb", buffering=0) as original:
        write_all(out, memoryview(source.header.raw))
        done = source.header.data_start  # all bytes before are written
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
    """Lay out a fresh file as the reference implementation does and fill it tensor by tensor.

    Args:
        target: a file that does not exist yet.
        specs: name, dtype and shape of every tensor, in any order.
        produce: gives the content of a tensor by name; called once each, in file order (widest dtype
            first, then by name).
        metadata: free text for `__metadata__`, written in the order of its keys; {"format": "pt"} is what
            transformers expects.

    Returns:
        The header, read back from the written file.

    Raises:
        UsageError: `target` exists.
        FormatError: a name twice, an unknown dtype, or content of another dtype or shape than announced.
        SppFxError: the disk is full or refuses to be written.

    On any error `target` is removed.
    """
    ordered = layout(specs, target)
    raw = header_bytes(ordered, dict(sorted((metadata or {}).items())), target)
    with new_file(target) as out:
        write_all(out, memoryview(raw))
        for name, dtype, shape in ordered:
            write_content(out, produce(name), dtype, shape, f"{target}: tensor {shown(name)}")
    return read_header(target)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a regular file to a path that does not exist yet, and fsync it; missing folders are made.

    Raises:
        UsageError: `target` exists.
        SppFxError: either file cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as out, open(source, "rb", buffering=0) as original:
        copy_bytes(original, out, 0, os.fstat(original.fileno()).st_size, source)


@contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """An OSError of the block that names no file names this one: calls on descriptors know none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(target: Path, *, sync: bool = True) -> Generator[FileIO, None, None]:
    """An unbuffered file that must be new; fsynced at the end unless `sync` is false, removed when anything fails.

    Raises:
        UsageError: `target` exists.
        WriteError: an OSError of the block, or of opening or syncing the file; names it.
    """
    try:
        file = open(target, "xb", buffering=0)  # noqa: SIM115 (closed below, on every way)
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
    """Copy bytes start <= i < stop of `source` to the same position of `out`; inside the kernel where it can.

    The position of neither file counts or moves, so that several threads may copy at once.

    Args:
        path: of `source`, for errors.

    Raises:
        FormatError: `source` ends before.
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
            fast = copied > 0  # not supported, or a file system that answers 0 before the end: copy by hand
        if not copied:
            with naming(path):
                data = os.pread(source.fileno(), min(_COPY_BYTES, stop - start), start)
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
    if isinstance(content, torch.Tensor):
        if content.shape != expected:
            raise FormatError(f"{where}: needs shape {list(expected)}, was given {list(content.shape)}")
        _write_tensor(out, content, want, where)
        return
    rows = 0
    for block in content:
        if len(block.shape) != len(expected) or block.shape[1:] != expected[1:]:
            raise FormatError(
                f"{where}: a block of rows of shape {list(expected)} cannot have shape {list(block.shape)}"
            )
        rows += block.shape[0] if expected else 1
        if rows > (expected[0] if expected else 1):
            raise FormatError(f"{where}: was given more rows than its shape {list(expected)} has")
        _write_tensor(out, block, want, where)
        del block  # before the next one is made
    if rows != (expected[0] if expected else 1):
        raise FormatError(f"{where}: was given {rows} rows of its shape {list(expected)}")


def _write_tensor(out: FileIO, tensor: "torch.Tensor", dtype: "torch.dtype", where: str) -> None:
    import torch

    if tensor.dtype != dtype:
        raise FormatError(f"{where}: needs {dtype}, was given {tensor.dtype}")
    if tensor.numel() == 0:
        return
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    write_all(out, plain.reshape(-1).view(torch.uint8).numpy().data)


def layout(specs: Iterable[TensorSpec], target: Path) -> list[TensorSpec]:
    """The order of the reference implementation: widest dtype first, then by name.

    Raises:
        FormatError: a name twice, or an unknown dtype.
    """
    ordered = list(specs)
    names: set[str] = set()
    for name, dtype, _ in ordered:
        where = f"{target}: tensor {shown(name)}"
        if name in names or name == "__metadata__":
            reason = "is announced twice" if name in names else "has a name that the format reserves"
            raise FormatError(f"{where}: {reason}")
        if dtype not in BITS:
            raise FormatError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(BITS)}")
        names.add(name)
    ordered.sort(key=lambda spec: (-LAYOUT_RANK[spec[1]], spec[0]))
    return ordered


def header_bytes(ordered: list[TensorSpec], metadata: Mapping[str, str], target: Path) -> bytes:
    """Length and header of a file of these tensors in this order, to the first tensor's first byte.

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
        make: called with the stored bytes and a buffer of the same length, on any thread; what it returns
            (never None) tells what it did.
    """

    start: int
    stop: int
    make: Callable[[Bytes, Bytes], Made]


def rewrite(source: Shard, target: Path, changes: Iterable[Change[Made]]) -> Iterator[Made]:
    """Write a shard again with the same header and the same offsets.

    Spans are independent: each is read, changed and written by one thread, so that these overlap on every core.

    Args:
        source: the shard to start from; it is not modified.
        target: a file that does not exist yet. It is whole when the iterator is exhausted, not yet fsynced;
            on an error, or when the iterator is closed early, it is removed.
        changes: in the order of the file, without overlaps; bytes between them are copied.

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


def copy_others(source: ModelFolder, target: Path, skip: Collection[str] = ()) -> None:
    """Copy configuration, tokenizer and the index of the weights.

    Args:
        source: a model folder.
        target: an existing folder that holds none of them.
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
    """Write a file for each weight file of a model; those that an earlier run finished stay as they are.

    Args:
        source: a folder opened with its weights.
        target: where the files go; the folder of `work`, or one in it.
        write: writes the file of a shard to a path that does not exist yet; returns its facts, JSON.
        work: what knows of earlier runs; without one, every file is written.
        names: of the files, by default those of the model's.

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
