"""The tensors of an ONNX file as a stream: their bytes go to a file as they come, the graph follows at the end.

A protobuf is limited to 2 GiB and is held in memory as a whole, by whoever writes it and whoever reads it.
So the bytes go into a second file, and into the graph only where they are few.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from spp_fx.errors import SppFxError

SINGLE_FILE_LIMIT = 2**28
"""Bytes of tensors up to which they stay in the graph's file: more than that is not worth holding at once."""
_INLINE_BELOW = 1024  # bytes; small tensors (shapes, axes, tables) are what shape inference reads
_PAGE = 4096

TYPES: dict[torch.dtype, int] = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
TORCH_TYPES = {number: dtype for dtype, number in TYPES.items()}


class DataFile:
    """A new file that tensors are appended to; each comes back as a TensorProto that points to its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(
        self, name: str, dtype: int, dims: Iterable[int], parts: Iterable[npt.NDArray[Any]]
    ) -> TensorProto:
        """Append a tensor.

        Args:
            name: in the graph; may be empty.
            dtype: ONNX data type.
            dims: its shape.
            parts: its elements in row-major order, in as many arrays as they come in.

        Raises:
            SppFxError: the parts are more or fewer bytes than the shape says.
        """
        tensor = TensorProto(name=name, data_type=dtype, dims=list(dims))
        length = tensor_bytes(tensor)
        self._file.write(b"\0" * (-self._file.tell() % (_PAGE if length >= 2**20 else 16)))
        offset = self._file.tell()
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        if self._file.tell() - offset != length:
            raise SppFxError(
                f"{self.path}: {name}: {self._file.tell() - offset} bytes for a tensor of {length}"
            )
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def add_tensor(self, name: str, value: Tensor) -> TensorProto:
        """Append a torch tensor as it is."""
        return self.add(name, TYPES[value.dtype], value.shape, [bytes_of(value)] if value.numel() else [])


def bytes_of(value: Tensor) -> npt.NDArray[np.uint8]:
    """The elements of a tensor in row-major order, as bytes: a view where it is contiguous."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's data, counted from its shape: protobuf copies the data on every look at it."""
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.prod(tensor.dims) * itemsize


def save(proto: onnx.ModelProto, path: Path, data: Path, *, single_file_limit: int | None = None) -> None:
    """Write the graph beside its data, or with the data inside where that is small; `data` is then removed.

    onnx.save knows neither sparse tensors nor their external data, so the graph is written as it is.

    Args:
        proto: the model; its external tensors lie in `data`. Their place is changed where they move inside.
        single_file_limit: bytes of `data` up to which everything becomes one file; `SINGLE_FILE_LIMIT` if None.

    Raises:
        SppFxError: what stays in the graph does not fit one protobuf of 2 GiB.
    """
    whole = data.stat().st_size <= (SINGLE_FILE_LIMIT if single_file_limit is None else single_file_limit)
    with data.open("rb") as file:
        for tensor in all_tensors(proto):
            if tensor.data_location == TensorProto.EXTERNAL and (
                whole or tensor_bytes(tensor) < _INLINE_BELOW
            ):
                place = {
                    entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
                }
                file.seek(place["offset"])
                tensor.raw_data = file.read(place["length"])
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
    try:
        serialized = proto.SerializeToString(deterministic=True)
    except (ValueError, MemoryError) as error:
        raise SppFxError(f"{path}: the graph does not fit one protobuf of 2 GiB: {error}") from error
    if len(serialized) >= 2**31:
        raise SppFxError(f"{path}: the graph does not fit one protobuf of 2 GiB ({len(serialized)} bytes)")
    path.write_bytes(serialized)
    if whole:
        data.unlink()


def all_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every initializer, and values and indices of the sparse ones."""
    yield from proto.graph.initializer
    for sparse in proto.graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
