"""The header of a safetensors file, checked in full before any of it is believed.

Format: an unsigned 64-bit little-endian length, that many bytes of JSON starting with '{' and padded with
spaces, then the tensors' bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from spp_fx.checkpoint.dtypes import BITS
from spp_fx.checkpoint.strict_json import parse_object, shown
from spp_fx.errors import FormatError, SppFxError, UsageError

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit on the JSON part, in bytes."""

MAX_DIMS = 64
_MAX_DIM = 2**63 - 1
_PREFIX = struct.Struct("<Q")
_GIT_LFS = b"version https://git-lfs.github.com/spec/"[: _PREFIX.size]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        metadata: the free text of `__metadata__` (empty when absent).
        tensors: by name, in the order of their bytes in the file.
        data_start: offset of the first tensor byte, in bytes.
        raw: the first `data_start` bytes of the file: length, JSON and padding.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int
    raw: bytes = field(repr=False)

    @property
    def data_end(self) -> int:
        """Offset just past the last tensor byte, which is the size of the file in bytes."""
        return max((info.end for info in self.tensors.values()), default=self.data_start)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor byte is read.

    Raises:
        UsageError: there is no such file, or it is not a regular file.
        FormatError: the header is larger than 100 MB or than the file, is not a JSON object, names a key
            twice, an unknown dtype, an impossible shape, or byte ranges that overlap, leave gaps, differ
            from shape times dtype, or do not end exactly at the end of the file.
    """
    size = regular_file_size(path)
    try:
        with open(path, "rb") as file:
            raw = _read_raw(file, path, size)
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(raw, path, size)


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file (symbolic links followed).

    Raises:
        UsageError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is not a regular file")
    return status.st_size


def _read_raw(file: IO[bytes], path: Path, size: int) -> bytes:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise FormatError(
            f"{path}: is {size} bytes long, a safetensors file starts with an 8-byte length; get it again"
        )
    if prefix == _GIT_LFS:
        raise FormatError(
            f"{path}: is a Git LFS pointer, not the file it stands for; run 'git lfs pull' (in CI: checkout with lfs)"
        )
    length = int(_PREFIX.unpack(prefix)[0])
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: claims a header of {length} bytes, the limit is {MAX_HEADER_BYTES}; "
            "this is not a safetensors file, or a damaged one: get it again"
        )
    if _PREFIX.size + length > size:
        missing = _PREFIX.size + length - size
        raise FormatError(
            f"{path}: truncated: the header needs {missing} more bytes than the file's {size}; get it again"
        )
    text = file.read(length)
    if len(text) != length:
        raise FormatError(f"{path}: shrank while its header was read; get it again")
    if not text.startswith(b"{"):
        raise FormatError(f"{path}: its header does not start with '{{'; this is not a safetensors file")
    return prefix + text


def _parse(raw: bytes, path: Path, size: int) -> Header:
    entries = parse_object(raw[_PREFIX.size :], f"{path}: header")
    metadata = _metadata(entries.pop("__metadata__", None), path)
    infos = [_tensor(name, entry, len(raw), path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_coverage(infos, len(raw), size, path)
    return Header(metadata, {info.name: info for info in infos}, len(raw), raw)


def _metadata(value: object, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{path}: __metadata__ is {shown(value)}, expected an object of strings")
    for key, text in cast("dict[str, object]", value).items():
        if not isinstance(text, str):
            raise FormatError(f"{path}: __metadata__ key {shown(key)} holds {shown(text)}, expected a string")
        if not (_is_unicode(key) and _is_unicode(text)):
            raise FormatError(f"{path}: __metadata__ key {shown(key)} holds text that is not Unicode")
    return cast("dict[str, str]", value)


def _tensor(name: str, value: object, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not _is_unicode(name):
        raise FormatError(f"{where}: its name is not Unicode text; write the file again")
    if not isinstance(value, dict):
        raise FormatError(f"{where}: its entry is {shown(value)}, expected an object; write the file again")
    entry = cast("dict[str, object]", value)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}: its entry has the keys {shown(sorted(entry))}, "
            "expected dtype, shape and data_offsets; write the file again"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(BITS)}")
    shape = _integers(entry["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMS:
        raise FormatError(f"{where}: has {len(shape)} dimensions, the limit is {MAX_DIMS}")
    offsets = _integers(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets {shown(list(offsets))} are not a start and an end")
    needed = stored_nbytes(dtype, shape, where)
    if offsets[1] - offsets[0] != needed:
        raise FormatError(
            f"{where}: {dtype} of shape {shown(list(shape))} takes {needed} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}; write the file again"
        )
    return TensorInfo(name, dtype, shape, data_start + offsets[0], data_start + offsets[1])


def stored_nbytes(dtype: str, shape: tuple[int, ...], where: str) -> int:
    """Bytes that a tensor takes in a file.

    Args:
        dtype: a name of `dtypes.BITS`.
        shape: non-negative dimensions.
        where: file and tensor, put before every message.

    Raises:
        FormatError: more than 2**63 - 1 elements, or a sub-byte dtype that does not end on a byte.
    """
    elements = 1
    for dim in shape:  # zero dimensions left out, so that the strides fit as well
        elements *= max(dim, 1)
        if elements > _MAX_DIM:
            raise FormatError(f"{where}: shape {shown(list(shape))} has more than 2**63 - 1 elements")
    bits = BITS[dtype] * (0 if 0 in shape else elements)
    if bits % 8:
        raise FormatError(f"{where}: {dtype} of shape {shown(list(shape))} does not end on a whole byte")
    return bits // 8


def _integers(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise FormatError(f"{where} is {shown(value)}, expected a list of integers; write the file again")
    numbers = cast("list[object]", value)
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MAX_DIM:
            raise FormatError(
                f"{where} holds {shown(number)}, expected an integer of 0 to 2**63 - 1; write the file again"
            )
    return tuple(cast("list[int]", value))


def _check_coverage(infos: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    """Each tensor begins where the one before ended, and the last one ends with the file."""
    position, before = data_start, "the header"
    for info in infos:
        where = f"{path}: tensor {shown(info.name)}"
        if info.start < position:
            raise FormatError(
                f"{where}: its bytes overlap those of {before} by {position - info.start}; "
                "write the file again"
            )
        if info.start > position:
            raise FormatError(
                f"{where}: {info.start - position} bytes between it and {before} belong to no tensor "
                "(a gap); write the file again"
            )
        position, before = info.end, f"tensor {shown(info.name)}"
    if position > size:
        first = next(info for info in infos if info.end > size)
        raise FormatError(
            f"{path}: truncated: {position - size} of {position} bytes are missing, "
            f"tensor {shown(first.name)} is the first that is not whole; get the file again"
        )
    if position < size:
        raise FormatError(
            f"{path}: {size - position} bytes after {before} belong to no tensor; write the file again"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
