"""Tensors of an ONNX file, streamed into a data file beside the graph.

A protobuf is limited to 2 GiB, and both its writer and its reader hold all of it in memory. So the bytes of
tensors go to a second file as they come. The graph is written last, with small tensors inside.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from spp_fx.errors import SppFxError

SINGLE_FILE_LIMIT = 2**28
"""Bytes of tensors up to which they are stored in the graph's file."""
_INLINE_BELOW = 1024  # bytes; shape inference reads small tensors (shapes, axes, tables)
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


def append(file: BinaryIO, name: str, dtype: int, dims: Sequence[int], data: npt.NDArray[Any]) -> TensorProto:
    """Append a tensor to a data file; returns the TensorProto that points to its bytes.

    Args:
        file: open for writing; the graph is written to the same folder.
        name: in the graph; may be empty.
        dtype: ONNX data type.
        dims: shape of the tensor.
        data: its elements in row-major order.
    """
    file.write(b"\0" * (-file.tell() % (_PAGE if data.nbytes >= 2**20 else 16)))
    tensor = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    location = {"location": Path(file.name).name, "offset": file.tell(), "length": data.nbytes}
    for key, value in location.items():
        tensor.external_data.add(key=key, value=str(value))
    if tensor_bytes(tensor) != data.nbytes:
        raise SppFxError(f"{file.name}: {name}: {data.nbytes} bytes for a tensor of {tensor_bytes(tensor)}")
    file.write(np.ascontiguousarray(data).data)
    return tensor


def append_tensor(file: BinaryIO, name: str, value: Tensor) -> TensorProto:
    """Append a torch tensor as it is."""
    return append(file, name, TYPES[value.dtype], value.shape, bits_of(value))


def bits_of(value: Tensor) -> npt.NDArray[Any]:
    """The elements of a tensor in row-major order, as unsigned integers of their width; a view if contiguous."""
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"u{value.itemsize}")


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's data, computed from its shape: protobuf copies the data on every access."""
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.prod(tensor.dims) * itemsize


def save(proto: onnx.ModelProto, path: Path, data: Path, *, single_file_limit: int | None = None) -> None:
    """Write the graph beside its data, or with the data inside if that is small; `data` is then removed.

    onnx.save does not support sparse tensors with external data.

    Args:
        proto: the model; its external tensors are in `data`. Those that move into the graph are changed.
        single_file_limit: bytes of `data` up to which everything becomes one file; `SINGLE_FILE_LIMIT` if None.

    Raises:
        SppFxError: what stays in the graph does not fit one protobuf of 2 GiB.
    """
    whole = data.stat().st_size <= (SINGLE_FILE_LIMIT if single_file_limit is None else single_file_limit)
    with data.open("rb") as file:
        for tensor in _all_tensors(proto):
            if tensor.data_location == TensorProto.EXTERNAL and (
                whole or tensor_bytes(tensor) < _INLINE_BELOW
            ):
                entries = {entry.key: entry.value for entry in tensor.external_data}
                file.seek(int(entries["offset"]))
                tensor.raw_data = file.read(int(entries["length"]))
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


def _all_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from proto.graph.initializer
    for sparse in proto.graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
