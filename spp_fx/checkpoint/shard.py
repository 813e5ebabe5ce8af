"""One safetensors file, read tensor by tensor or in blocks of rows, each as a copy of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spp_fx.checkpoint.dtypes import torch_dtype, torch_shape
from spp_fx.checkpoint.header import Header, TensorInfo, read_header
from spp_fx.checkpoint.strict_json import shown
from spp_fx.errors import FormatError, SppFxError, UsageError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 64 * 2**20
"""Default size of a row block, in bytes."""

_FLOATING = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_COMPARED_BYTES = 4 * 2**20
_READ_BYTES = 2**30  # one read call: some systems refuse or cut 2 GiB


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been checked.

    Attributes:
        path: the file.
        header: its checked header.
        name: the file's path inside its model folder, with '/' (the bare file name when it stands alone).
    """

    path: Path
    header: Header
    name: str

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "Shard":
        """Check the header of the file at `path`; raises what `read_header` raises."""
        return cls(path, read_header(path), path.name if name is None else name)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range of a tensor.

        Raises:
            UsageError: the file holds no such tensor.
        """
        info = self.header.tensors.get(name)
        if info is None:
            raise UsageError(f"{self.path}: holds no tensor {shown(name)}")
        return info

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, in memory of its own (the file may change or vanish afterwards).

        Raises:
            UsageError: no such tensor.
            FormatError: torch has no such dtype, the file shrank, or a BOOL byte is neither 0 nor 1.
        """
        info = self.info(name)
        return self._read(info, info.start, info.nbytes, self._torch_shape(info))

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows start <= i < stop along the first dimension; memory is bounded by these rows.

        Raises:
            UsageError: no such tensor, a scalar, or rows outside of the tensor.
            FormatError: as for `read`.
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
        """At most `count` bytes of a tensor from `start` on, as they are stored, whatever its dtype; without torch.

        Raises:
            UsageError: no such tensor.
            FormatError: the file shrank.
        """
        info = self.info(name)
        data = bytearray(min(count, info.nbytes - start))
        self._fill(info, info.start + start, memoryview(data))
        return data

    def difference(self, other: "Shard", name: str) -> str | None:
        """What differs between this file's tensor and another file's of the same name; None if no byte does.

        Memory holds a block of each.

        Raises:
            UsageError: one of them holds no such tensor.
            FormatError: a file shrank.
        """
        ours, theirs = self.info(name), other.info(name)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"different types ({ours.dtype} {list(ours.shape)}, {theirs.dtype} {list(theirs.shape)})"
        for start in range(0, ours.nbytes, _COMPARED_BYTES):
            if self.read_bytes(name, start, _COMPARED_BYTES) != other.read_bytes(
                name, start, _COMPARED_BYTES
            ):
                return "different values"
        return None

    def read_float64(self, name: str, row: int | None = None) -> NDArray[np.float64]:
        """A floating tensor as float64, exactly; without torch.

        Args:
            row: of the first dimension, to read that alone.

        Raises:
            UsageError: no such tensor, or no such row.
            FormatError: not one of F64, F32, F16, BF16; the file shrank.
        """
        info = self.info(name)
        if info.dtype not in _FLOATING:
            raise FormatError(f"{self.path}: tensor {shown(name)}: is {info.dtype}, no floating type")
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if row is not None:
            if not shape or not 0 <= row < shape[0]:
                raise UsageError(f"{self.path}: tensor {shown(name)} of shape {list(shape)} has no row {row}")
            nbytes //= shape[0]
            shape, start = shape[1:], start + row * nbytes
        data = np.empty(nbytes, dtype=np.uint8)
        self._fill(info, start, data.data)
        stored = data.view(_FLOATING[info.dtype])
        if info.dtype == "BF16":  # the upper half of a float32
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64).reshape(shape)

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> "Iterator[torch.Tensor]":
        """The tensor as consecutive blocks of rows, each of at most `max_bytes` bytes but at least a row.

        A scalar or an empty tensor comes as one block.
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
                file.seek(offset)
                whole = _fill(file, target)
        except OSError as error:
            raise SppFxError(f"{where}: cannot be read ({error.strerror})") from error
        if not whole:
            raise FormatError(f"{where}: the file shrank after its header was read; get it again")


def _fill(file: FileIO, target: memoryview) -> bool:
    """Read until `target` is full; false when the file ends before."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + _READ_BYTES])
        if not count:
            return False
        done += count
    return True
