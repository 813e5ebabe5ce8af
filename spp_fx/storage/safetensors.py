"""Reading safetensors files: dtypes, checked headers, tensors whole or in blocks of rows.

torch is imported only where its dtypes or tensors are needed.

Format: an unsigned 64-bit little-endian length, that many bytes of JSON starting with '{' and padded with
spaces, then the tensors' bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.strict_json import is_unicode, parse_object, regular_file_size, shown

if TYPE_CHECKING:
    import torch


# In the order of the reference implementation. Files hold tensors of the last dtype first, then by name.
_ORDER: tuple[tuple[str, int, str | None], ...] = (
    ("BOOL", 8, "bool"),
    ("F4", 4, "float4_e2m1fn_x2"),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
)

BITS: dict[str, int] = {name: bits for name, bits, _ in _ORDER}
"""Bits of one element by safetensors dtype name."""

LAYOUT_RANK: dict[str, int] = {name: rank for rank, (name, _, _) in enumerate(_ORDER)}
"""Files hold tensors of the highest rank first."""

_TORCH: dict[str, str] = {name: dtype for name, _, dtype in _ORDER if dtype is not None}


@cache
def _names() -> "dict[torch.dtype, str]":
    return {torch_dtype(name): name for name in _TORCH}


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name ('BF16' -> torch.bfloat16).

    Raises:
        FormatError: the name is unknown, or torch has no such dtype (F6_E2M3, F6_E3M2).
    """
    if name not in _TORCH:
        raise FormatError(f"torch has no dtype {name!r}; known: {', '.join(_TORCH)}")
    import torch

    return getattr(torch, _TORCH[name])


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype (torch.bfloat16 -> 'BF16').

    Raises:
        FormatError: safetensors cannot store the dtype (complex128, quantized and sub-byte integers).
    """
    if dtype not in _names():
        raise FormatError(f"{dtype} cannot be stored in a safetensors file; convert the tensor first")
    return _names()[dtype]


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape torch gives a stored tensor: F4 packs two elements of the last dimension in one.

    Raises:
        FormatError: an F4 tensor has no last dimension, or an odd one.
    """
    if dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise FormatError(f"an F4 tensor needs an even last dimension, found shape {list(shape)}")
    return (*shape[:-1], shape[-1] // 2)


BLOCK_BYTES = 64 * 2**20
"""Default size of a row block, in bytes."""

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit on the JSON part, in bytes."""

MAX_DIMS = 64
_MAX_DIM = 2**63 - 1
_PREFIX = struct.Struct("<Q")
_FLOATING = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_COMPARED_BYTES = 4 * 2**20
_READ_BYTES = 2**30  # one read call: some systems refuse or cut 2 GiB
_GIT_LFS = b"version https://git-lfs.github.com/spec/"[: _PREFIX.size]


def as_float64(data: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """The numbers that stored bytes, or bits, of F64, F32, F16 or BF16 stand for, flat."""
    stored = data.reshape(-1).view(_FLOATING[dtype])
    if dtype == "BF16":  # the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor; `start` and `end` count bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A header that has been checked.

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
        """Offset just past the last tensor byte: the size of the file."""
        return max((info.end for info in self.tensors.values()), default=self.data_start)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

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
    return parse_header(raw, path, size)


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
            "the file is damaged or not a safetensors file; get it again"
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


def parse_header(raw: bytes, path: Path | str, size: int | None = None) -> Header:
    """Check the first bytes of a safetensors file, up to its first tensor.

    Args:
        raw: length, JSON and padding.
        path: of the file, for errors.
        size: of the whole file in bytes; None where its end is not known.

    Raises:
        FormatError: as for `read_header`.
    """
    entries = parse_object(raw[_PREFIX.size :], f"{path}: header")
    metadata = _metadata(entries.pop("__metadata__", None), path)
    infos = [_tensor(name, entry, len(raw), path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    end = infos[-1].end if infos else len(raw)
    _check_coverage(infos, len(raw), end if size is None else size, path)
    return Header(metadata, {info.name: info for info in infos}, len(raw), raw)


def _metadata(value: object, path: Path | str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{path}: __metadata__ is {shown(value)}, expected an object of strings")
    for key, text in cast("dict[str, object]", value).items():
        if not isinstance(text, str):
            raise FormatError(f"{path}: __metadata__ key {shown(key)} holds {shown(text)}, expected a string")
        if not (is_unicode(key) and is_unicode(text)):
            raise FormatError(f"{path}: __metadata__ key {shown(key)} holds text that is not Unicode")
    return cast("dict[str, str]", value)


def _tensor(name: str, value: object, data_start: int, path: Path | str) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not is_unicode(name):
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
        dtype: a name of `BITS`.
        shape: non-negative dimensions.
        where: file and tensor, put before every message.

    Raises:
        FormatError: more than 2**63 - 1 elements, or a sub-byte dtype that does not end on a byte.
    """
    elements = 1
    for dim in shape:  # without zero dimensions: the strides must fit too
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


def _check_coverage(infos: list[TensorInfo], data_start: int, size: int, path: Path | str) -> None:
    """Each tensor begins where the one before it ends, and the last one ends with the file."""
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
            f"from tensor {shown(first.name)} on; get the file again"
        )
    if position < size:
        raise FormatError(
            f"{path}: {size - position} bytes after {before} belong to no tensor; write the file again"
        )


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been checked.

    Attributes:
        path: the file.
        header: its checked header.
        name: its path in the model folder, with '/'; of a file alone, its name.
    """

    path: Path
    header: Header
    name: str

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "Shard":
        """Raises what `read_header` raises."""
        return cls(path, read_header(path), path.name if name is None else name)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range of a tensor; UsageError if the file does not hold it."""
        info = self.header.tensors.get(name)
        if info is None:
            raise UsageError(f"{self.path}: holds no tensor {shown(name)}")
        return info

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, copied from the file.

        Raises:
            UsageError: no such tensor.
            FormatError: torch has no such dtype, the file shrank, or a BOOL byte is neither 0 nor 1.
        """
        info = self.info(name)
        return self._read(info, info.start, info.nbytes, self._torch_shape(info))

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows start <= i < stop along the first dimension, and no others.

        Raises:
            UsageError: no such tensor, a scalar, or rows outside of the tensor.
            FormatError: as `read`.
        """
        info = self.info(name)
        shape = self._torch_shape(info)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise UsageError(
                f"{self.path}: tensor {shown(name)} of shape {list(shape)} has no rows {start} to {stop}"
            )
        row_bytes = info.nbytes // shape[0] if shape[0] else 0
        return self._read(
            info, info.start + start * row_bytes, (stop - start) * row_bytes, (stop - start, *shape[1:])
        )

    def read_bytes(self, name: str, start: int, count: int) -> bytearray:
        """At most `count` stored bytes of a tensor from its byte `start` on.

        Raises:
            UsageError: no such tensor.
            FormatError: the file shrank.
        """
        info = self.info(name)
        data = bytearray(min(count, info.nbytes - start))
        self._fill(info, info.start + start, memoryview(data))
        return data

    def difference(self, other: "Shard", name: str) -> str | None:
        """How a tensor differs from that of the same name in another file, compared block by block; None if equal.

        Raises:
            UsageError: one of the files does not hold it.
            FormatError: a file shrank.
        """
        ours, theirs = self.info(name), other.info(name)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"different types ({ours.dtype} {list(ours.shape)}, {theirs.dtype} {list(theirs.shape)})"
        for start in range(0, ours.nbytes, _COMPARED_BYTES):
            block = self.read_bytes(name, start, _COMPARED_BYTES)
            if block != other.read_bytes(name, start, _COMPARED_BYTES):
                return "different values"
        return None

    def read_float64(self, name: str, row: int | None = None) -> NDArray[np.float64]:
        """A tensor of F64, F32, F16 or BF16 as float64, exactly.

        Args:
            row: index along the first dimension, to read only that row.

        Raises:
            UsageError: no such tensor, or no such row.
            FormatError: another dtype; the file shrank.
        """
        info = self.info(name)
        if info.dtype not in _FLOATING:
            raise FormatError(
                f"{self.path}: tensor {shown(name)}: is {info.dtype}, not one of {', '.join(_FLOATING)}"
            )
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if row is not None:
            if not shape or not 0 <= row < shape[0]:
                raise UsageError(f"{self.path}: tensor {shown(name)} of shape {list(shape)} has no row {row}")
            nbytes //= shape[0]
            shape, start = shape[1:], start + row * nbytes
        data = np.empty(nbytes, dtype=np.uint8)
        self._fill(info, start, data.data)
        return as_float64(data, info.dtype).reshape(shape)

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> "Iterator[torch.Tensor]":
        """Consecutive blocks of rows, each of at most `max_bytes` bytes but at least one row.

        A scalar or an empty tensor is one block.
        """
        info = self.info(name)
        shape = self._torch_shape(info)
        if not shape or info.nbytes == 0:
            yield self.read(name)
            return
        step = max(1, max_bytes // (info.nbytes // shape[0]))
        for start in range(0, shape[0], step):
            yield self.read_rows(name, start, min(start + step, shape[0]))

    def _torch_shape(self, info: TensorInfo) -> tuple[int, ...]:
        try:
            torch_dtype(info.dtype)
            return torch_shape(info.dtype, info.shape)
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {shown(info.name)}: {error}") from None

    def _read(self, info: TensorInfo, offset: int, nbytes: int, shape: tuple[int, ...]) -> "torch.Tensor":
        import torch

        data = torch.empty(nbytes, dtype=torch.uint8)
        self._fill(info, offset, data.numpy().data)
        if info.dtype == "BOOL" and nbytes and int(data.max()) > 1:
            where = f"{self.path}: tensor {shown(info.name)}"
            raise FormatError(f"{where}: holds a byte that is neither 0 nor 1; write the file again")
        return data.view(torch_dtype(info.dtype)).reshape(shape)

    def _fill(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        where = f"{self.path}: tensor {shown(info.name)}"
        try:
            with open(self.path, "rb", buffering=0) as file:
                whole = read_at(file.fileno(), offset, target) == len(target)
        except OSError as error:
            raise SppFxError(f"{where}: cannot be read ({error.strerror})") from error
        if not whole:
            raise FormatError(f"{where}: the file shrank after its header was read; get it again")


def read_at(descriptor: int, position: int, target: memoryview) -> int:
    """Fill `target` from a position of an open file; returns the number of bytes, fewer only at its end."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + _READ_BYTES]], position + done)
        if not count:
            break
        done += count
    return done
