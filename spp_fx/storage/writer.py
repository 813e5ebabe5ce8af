"""Writing safetensors files and model folders as a stream, one tensor or one block of rows in memory at a time.

Spans are independent of one another, so that reading, changing and writing overlap on every core: each is
read, changed and written by one thread, at the place where it was.
"""

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError, UsageError, WriteError
from spp_fx.parallel import in_order
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.output import check_space
from spp_fx.storage.safetensors import (
    BITS,
    LAYOUT_RANK,
    MAX_HEADER_BYTES,
    Header,
    Shard,
    TensorInfo,
    read_header,
    stored_nbytes,
    torch_dtype,
    torch_shape,
)
from spp_fx.storage.strict_json import shown
from spp_fx.storage.workspace import Workspace

if TYPE_CHECKING:
    import torch


Content: TypeAlias = "torch.Tensor | Iterable[torch.Tensor]"
"""A tensor, or its consecutive blocks of rows along the first dimension."""

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype ('BF16') and stored shape of a tensor to be written."""

_COPY_BYTES = 8 * 2**20
_NO_FAST_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)


@dataclass(frozen=True)
class Rewritten:
    """What `rewrite_shard` did: the names it replaced, in file order, and bytes of either kind written."""

    path: Path
    replaced: tuple[str, ...]
    replaced_bytes: int
    copied_bytes: int


def rewrite_shard(
    source: Shard, target: Path, replace: "Callable[[TensorInfo], Content | None]"
) -> Rewritten:
    """Write a shard with the header of `source` byte for byte, and some of its tensors replaced.

    Args:
        source: the shard to start from; it is not modified.
        target: a file that does not exist yet.
        replace: called once for each tensor in file order. None copies the stored bytes (the tensor is
            never decoded); a tensor, or an iterable of row blocks made one at a time, takes their place. It
            reads what it needs from `source` itself.

    Raises:
        UsageError: `target` exists.
        FormatError: a replacement of another dtype or shape; `source` shrank.
        SppFxError: the disk is full or refuses to be written.

    On any error `target` is removed.
    """
    replaced: list[str] = []
    replaced_bytes = copied_bytes = 0
    with new_file(target) as out, open(source.path, "rb", buffering=0) as original:
        write_all(out, memoryview(source.header.raw))
        start = stop = source.header.data_start  # the run of bytes still to be copied
        for info in source.header.tensors.values():
            content = replace(info)
            if content is None:
                stop = info.end
                continue
            _append(original, out, start, stop, source.path)
            copied_bytes += stop - start
            write_content(out, content, info.dtype, info.shape, f"{target}: tensor {shown(info.name)}")
            replaced.append(info.name)
            replaced_bytes += info.nbytes
            start = stop = info.end
        _append(original, out, start, stop, source.path)
        copied_bytes += stop - start
    return Rewritten(target, tuple(replaced), replaced_bytes, copied_bytes)


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
    """Copy the bytes of a regular file to a path that does not exist yet, and fsync it.

    Raises:
        UsageError: `target` exists.
        SppFxError: either file cannot be read or written.
    """
    with new_file(target) as out, open(source, "rb", buffering=0) as original:
        _append(original, out, 0, os.fstat(original.fileno()).st_size, source)


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


def copy_bytes(source: FileIO, out: FileIO, start: int, stop: int, path: Path) -> None:
    """Copy bytes start <= i < stop of `source` to the same place of `out`; inside the kernel where it can.

    Neither file's position counts or moves, so that several threads may copy at once.

    Args:
        path: of `source`, for errors.

    Raises:
        FormatError: `source` ends before.
    """
    _copy(source, out, start, start, stop - start, path)


def _append(source: FileIO, out: FileIO, start: int, stop: int, path: Path) -> None:
    """Append bytes start <= i < stop of `source` to `out`."""
    _copy(source, out, start, out.tell(), stop - start, path)
    out.seek(stop - start, os.SEEK_CUR)


def _copy(source: FileIO, out: FileIO, start: int, to: int, count: int, path: Path) -> None:
    fast = hasattr(os, "copy_file_range")
    done = 0
    while done < count:
        copied = 0
        if fast:
            try:
                copied = os.copy_file_range(
                    source.fileno(), out.fileno(), count - done, start + done, to + done
                )
            except OSError as error:
                if error.errno not in _NO_FAST_COPY:
                    raise
            fast = copied > 0  # refused, or a file system that answers 0 before the end: copy by hand
        if not copied:
            with naming(path):
                data = os.pread(source.fileno(), min(_COPY_BYTES, count - done), start + done)
            if not data:
                raise FormatError(f"{path}: shrank while it was copied; get it again")
            while copied < len(data):
                copied += os.pwrite(out.fileno(), data[copied:], to + done + copied)
        done += copied


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
        FormatError: a name is no Unicode text, or the header is longer than the format allows.
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


PART_BYTES = 256 * 2**20
"""Bytes after which what is written is made durable: a second or two of work is the most that is lost."""


@dataclass(frozen=True)
class Memory:
    """What a writer knows that its file does not say.

    Attributes:
        facts: makes durable what it depends on, and gives it as JSON.
        recall: called with the names of the tensors that are written, in order, and the facts of that
            moment; says whether it can go on from there.
    """

    facts: Callable[[], dict[str, Any]]
    recall: Callable[[list[str], dict[str, Any]], bool]


def write_in_parts(
    work: Workspace,
    name: str,
    specs: Iterable[TensorSpec],
    produce: Callable[[str], Content],
    metadata: Mapping[str, str],
    memory: Memory,
) -> dict[str, Any]:
    """As `write_safetensors`, but a run that was killed goes on after the tensors that were durable.

    Args:
        work: where the file is written.
        name: its path in `work.folder`.
        specs, produce, metadata: as for `write_safetensors`; `produce` is called for what is not there yet.
        memory: of the caller.

    Returns:
        The facts of the finished file.

    Raises:
        FormatError: as `write_safetensors`.
        SppFxError: the disk has no room for the whole file; says both numbers.
        OSError: the disk is full or refuses to be written.
    """
    if (facts := work.finished(name)) is not None:
        return facts
    path = work.folder / name
    ordered = layout(specs, path)
    raw = header_bytes(ordered, metadata, path)
    sizes = (stored_nbytes(dtype, shape, shown(tensor)) for tensor, dtype, shape in ordered)
    ends = list(accumulate(sizes, initial=len(raw)))
    done = _written(work, name, raw, ends, [tensor for tensor, _, _ in ordered], memory)
    if done == 0:
        path.unlink(missing_ok=True)
    start = ends[done] if done else 0
    check_space(path, path.parent, ends[-1] - start)
    with open(path, "r+b" if done else "xb", buffering=0) as out:
        if not done:
            write_all(out, memoryview(raw))
        out.seek(ends[done])
        for (tensor, dtype, shape), end in zip(ordered[done:], ends[done + 1 :], strict=True):
            write_content(out, produce(tensor), dtype, shape, f"{path}: tensor {shown(tensor)}")
            if end - start >= PART_BYTES and end < ends[-1]:
                os.fsync(out.fileno())
                work.keep_part(name, end, **memory.facts())
                start = end
        os.fsync(out.fileno())
    work.finish(name, synced=True, **memory.facts())
    return work.finished(name) or {}


def _written(
    work: Workspace, name: str, raw: bytes, ends: list[int], tensors: list[str], memory: Memory
) -> int:
    """How many tensors an earlier run left whole; 0 where the file is not the one to be written."""
    part = work.part(name)
    if part is None or part[0] not in ends or _first_bytes(work.folder / name, len(raw)) != raw:
        return 0
    done = ends.index(part[0])
    return done if memory.recall(tensors[:done], part[1]) else 0


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def copy_others(source: ModelFolder, target: Path, skip: Collection[str] = ()) -> None:
    """Copy configuration, tokenizer and the index of the weights.

    Args:
        source: a model folder.
        target: an existing folder that holds none of them.
        skip: relative paths ('README.md') of files that are not copied.
    """
    names = [path.as_posix() for path in source.other_files() if path.as_posix() not in skip]
    for name in [*names, *([source.index] if source.index is not None else [])]:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.path / name, file)


def write_shards(
    source: ModelFolder,
    target: Path,
    write: Callable[[Shard, Path], dict[str, Any]],
    work: Workspace | None = None,
) -> list[dict[str, Any]]:
    """Write a file for each weight file of a model; those that an earlier run finished stay as they are.

    Args:
        source: a folder opened with its weights.
        target: where the files go, under the names of the model's; the folder of `work`, or one in it.
        write: writes the file of a shard to a path that does not exist yet; returns its facts, JSON.
        work: what knows of earlier runs; without one, every file is written.

    Returns:
        The facts of each file, in the order of `source.shards`.
    """
    every: list[dict[str, Any]] = []
    for shard in source.shards:
        file = within(target, shard.name)
        name = "" if work is None else file.relative_to(work.folder).as_posix()
        facts = None if work is None else work.finished(name)
        if facts is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = write(shard, file)
            if work is not None:
                work.finish(name, **facts)
        every.append(facts)
    return every
