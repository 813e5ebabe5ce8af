"""The weights of an .onnx file, dense and sparse, read from the protobuf and believed only when checked.

This shares no code with what writes such files: it is what a written file is checked with.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from spp_fx.errors import FormatError
from spp_fx.storage.folder import within
from spp_fx.storage.strict_json import regular_file_size

TENSOR_LIMIT = 2**31
"""onnxruntime's limit of a sparse tensor's dense form, in bytes; more elements than that are believed of none."""
PROTOBUF_LIMIT = 2**31
"""Bytes of a protobuf: no parser takes as many."""
_WEIGHT_TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
}
_BITS = {
    number: 4 if "4" in name else 2
    for name, number in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
"""Bits of the types of which a byte holds several elements; which there are depends on the onnx package."""


@dataclass(frozen=True)
class SparseInitializer:
    """A sparse initializer as read: `indices` (nnz,) int64, ascending, unique; `values` (nnz,) of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    index_dtype: str
    indices: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    def mask(self) -> npt.NDArray[np.bool_]:
        """Where the tensor is non-zero, of `shape`; a stored zero does not count."""
        flat = np.zeros(math.prod(self.shape), dtype=np.bool_)
        flat[self.indices] = self.values != 0
        return flat.reshape(self.shape)

    def dense(self) -> npt.NDArray[Any]:
        """The whole tensor, of `shape` and `dtype`."""
        flat = np.zeros(math.prod(self.shape), dtype=self.values.dtype)
        flat[self.indices] = self.values
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class DenseInitializer:
    """A dense initializer of two or more dimensions and of a type that weights have, as read."""

    name: str
    array: npt.NDArray[Any]


def load_sparse_masks(path: Path) -> Iterator[SparseInitializer | DenseInitializer]:
    """Read the weights of an .onnx file, one at a time, believing nothing.

    Yields every sparse initializer, and every dense one of two or more dimensions that is fp32, fp16, bf16,
    double or int8, in the order of the file (dense first). bfloat16 comes as ml_dtypes.bfloat16. External
    data is read only from files inside the model's folder. Both forms of indices the standard knows are
    read: linear [nnz], and one row per element [nnz, rank].

    Raises:
        FormatError: the file is no ONNX model; a name is missing or comes twice; indices are of another
            type, out of bounds, not ascending or not unique; data is truncated, of another length than
            its shape says, or outside the folder. The message names the file and the tensor.
    """
    for where, tensor in _entries(path):
        if isinstance(tensor, onnx.SparseTensorProto):
            yield _read_sparse(path, where, tensor)
        elif len(tensor.dims) >= 2 and tensor.data_type in _WEIGHT_TYPES:
            yield DenseInitializer(tensor.name, _read(path, where, tensor))


def read_tensors(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Name and numbers of every initializer, sparse ones expanded; checked as in `load_sparse_masks`."""
    for where, tensor in _entries(path):
        if isinstance(tensor, onnx.SparseTensorProto):
            yield tensor.values.name, _read_sparse(path, where, tensor).dense()
        else:
            yield tensor.name, _read(path, where, tensor)


class OnnxFile:
    """An .onnx file, whose weights are read one by one when they are asked for.

    Raises:
        UsageError: there is no such file.
        FormatError: it is no ONNX model; a name is missing or comes twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.proto = load_model(path)
        seen: set[str] = set()
        self.dense = {t.name: t for t in self.proto.graph.initializer if _claim(path, t.name, seen)}
        self.sparse = {
            s.values.name: s for s in self.proto.graph.sparse_initializer if _claim(path, s.values.name, seen)
        }
        for node in self.proto.graph.node:
            for output in node.output:
                if output in seen:  # a runtime may take either
                    raise FormatError(f"{output} ({path}): is made twice, the second time by {node.op_type}")
                if output:
                    seen.add(output)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an initializer, as the file says."""
        return tuple((self.dense.get(name) or self.sparse[name]).dims)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The numbers of an initializer, a sparse one expanded; checked as in `load_sparse_masks`."""
        where = f"{name} ({self.path})"
        if name in self.sparse:
            return _read_sparse(self.path, where, self.sparse[name]).dense()
        return _read(self.path, where, self.dense[name])

    def read_stored(self, name: str, stored: TensorProto | onnx.SparseTensorProto) -> npt.NDArray[Any]:
        """As `read`, of a tensor wherever the file has it: in a subgraph, a local function, a Constant node."""
        where = f"{name} ({self.path})"
        if isinstance(stored, onnx.SparseTensorProto):
            return _read_sparse(self.path, where, stored).dense()
        return _read(self.path, where, stored)

    def is_weight(self, name: str) -> bool:
        """Whether an initializer has two dimensions or more and a type that weights have."""
        tensor = self.dense.get(name)
        return name in self.sparse or (
            tensor is not None and len(tensor.dims) >= 2 and tensor.data_type in _WEIGHT_TYPES
        )


def load_model(path: Path) -> onnx.ModelProto:
    """The protobuf of an .onnx file, external data left where it is.

    Raises:
        UsageError: there is no such file.
        FormatError: the file cannot be read or is no ONNX model.
    """
    if (size := regular_file_size(path)) >= PROTOBUF_LIMIT:
        raise FormatError(
            f"{path}: is {size} bytes long, a protobuf is less than {PROTOBUF_LIMIT}; get it again"
        )
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise FormatError(f"{path}: not an ONNX model: {error}") from error
    if model.ir_version <= 0 or not model.HasField("graph"):
        raise FormatError(f"{path}: not an ONNX model: it holds no graph")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise FormatError(f"{path}: not an ONNX model: a name in it is not UTF-8; get it again")
    return model


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every text that is looked at later: protobuf gives those that are not UTF-8 out as bytes."""
    for entry in (*model.opset_import, *(each for f in model.functions for each in f.opset_import)):
        yield entry.domain
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
    bodies = [model.graph, *model.functions]
    for body in bodies:  # grows by the graphs inside its nodes
        tensors: list[TensorProto] = []
        sparse: list[onnx.SparseTensorProto] = []
        if isinstance(body, onnx.GraphProto):
            tensors += body.initializer
            sparse += body.sparse_initializer
            yield from (value.name for value in (*body.input, *body.output))
        for node in body.node:
            yield from (node.op_type, node.name, node.domain, *node.input, *node.output)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.ref_attr_name)
                bodies += [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]
                tensors += [attribute.t] if attribute.HasField("t") else []
                sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        tensors += [part for each in sparse for part in (each.values, each.indices)]
        for tensor in tensors:
            yield tensor.name
            for entry in tensor.external_data:
                yield from (entry.key, entry.value)


def _entries(path: Path) -> Iterator[tuple[str, TensorProto | onnx.SparseTensorProto]]:
    model = load_model(path)
    seen: set[str] = set()
    for tensor in model.graph.initializer:
        yield _claim(path, tensor.name, seen), tensor
    for sparse in model.graph.sparse_initializer:
        yield _claim(path, sparse.values.name, seen), sparse


def _claim(path: Path, name: str, seen: set[str]) -> str:
    if not name:
        raise FormatError(f"{path}: an initializer has no name")
    if name in seen:
        raise FormatError(f"{name} ({path}): two initializers have this name")
    seen.add(name)
    return f"{name} ({path})"


def _read_sparse(path: Path, where: str, sparse: onnx.SparseTensorProto) -> SparseInitializer:
    shape = tuple(sparse.dims)
    if not shape or min(shape) <= 0:
        raise FormatError(f"{where}: {list(shape)} is no shape of a sparse tensor")
    numel = math.prod(shape)
    if numel > TENSOR_LIMIT:
        raise FormatError(
            f"{where}: {list(shape)} is larger than a sparse tensor can be, {TENSOR_LIMIT} elements"
        )
    if sparse.indices.data_type not in (
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
    ):
        raise FormatError(f"{where}: indices have type {sparse.indices.data_type}, not int8, 16, 32 or 64")
    values = _read(path, f"{where}, values", sparse.values)
    stored = _read(path, f"{where}, indices", sparse.indices)
    indices: npt.NDArray[np.int64] = stored.astype(np.int64)
    if values.ndim != 1 or indices.shape not in {(values.size,), (values.size, len(shape))}:
        raise FormatError(f"{where}: {list(values.shape)} values but {list(indices.shape)} indices")
    if indices.ndim == 2:
        if ((indices < 0) | (indices >= np.array(shape))).any():
            raise FormatError(f"{where}: an index is outside the shape {list(shape)}")
        indices = np.asarray(np.ravel_multi_index(tuple(indices.T), shape), dtype=np.int64)
    outside = (indices < 0) | (indices >= numel)
    if outside.any():
        at = int(outside.argmax())
        raise FormatError(f"{where}: index {at} is {int(indices[at])}, outside 0..{numel - 1}")
    steps = np.diff(indices)
    if (steps <= 0).any():
        at = int((steps <= 0).argmax())
        raise FormatError(
            f"{where}: indices {at} and {at + 1} are {int(indices[at])} and {int(indices[at + 1])}, "
            "they must ascend without repeats"
        )
    return SparseInitializer(sparse.values.name, shape, str(values.dtype), str(stored.dtype), indices, values)


def _read(path: Path, where: str, tensor: TensorProto) -> npt.NDArray[Any]:
    """The tensor's numbers, of its shape; inline or external."""
    dims = list(tensor.dims)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError as error:
        raise FormatError(f"{where}: unknown data type {tensor.data_type}") from error
    if dtype.hasobject:
        raise FormatError(f"{where}: holds text where numbers are expected")
    if any(not 0 <= dim < 2**48 for dim in dims):
        raise FormatError(f"{where}: {dims} is no shape")
    if tensor.HasField("segment"):
        raise FormatError(f"{where}: is one segment of a tensor, which no runtime takes")
    count = math.prod(dims)
    if tensor.data_type in _BITS:
        return _read_narrow(path, where, tensor, count)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _read_external(path, where, tensor, dtype, count).reshape(dims)
    if tensor.HasField("raw_data"):
        needed = count * dtype.itemsize
        if len(tensor.raw_data) != needed:
            raise FormatError(
                f"{where}: {len(tensor.raw_data)} bytes of data, the shape {dims} needs {needed}"
            )
        return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(dims)
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: the data does not fit the shape {dims}: {error}") from error


def _read_narrow(path: Path, where: str, tensor: TensorProto, count: int) -> npt.NDArray[Any]:
    """A tensor several elements of which share a byte; onnx unpacks it."""
    needed = -(-count * _BITS[tensor.data_type] // 8)
    packed = tensor
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _read_external(path, where, tensor, np.dtype(np.uint8), needed).tobytes()
        packed = TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=data)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        raise FormatError(
            f"{where}: {len(tensor.raw_data)} bytes of data, the shape {list(tensor.dims)} needs {needed}"
        )
    elif not tensor.HasField("raw_data") and len(tensor.int32_data) > needed:  # each is one byte
        raise FormatError(f"{where}: {len(tensor.int32_data)} numbers are too many for {list(tensor.dims)}")
    try:
        return onnx.numpy_helper.to_array(packed)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: the data does not fit the shape {list(tensor.dims)}: {error}") from error


def _read_external(
    path: Path, where: str, tensor: TensorProto, dtype: np.dtype[Any], count: int
) -> npt.NDArray[Any]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _data_file(path, where, entries.get("location", ""))
    needed = count * dtype.itemsize
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length)):
        raise FormatError(f"{where}: offset {offset!r} or length {length!r} is no number")
    if int(length) != needed:
        raise FormatError(f"{where}: {length} bytes of data, the shape {list(tensor.dims)} needs {needed}")
    if int(offset) + needed > os.path.getsize(file):
        raise FormatError(f"{where}: {file.name} is truncated, it ends before byte {int(offset) + needed}")
    return np.fromfile(file, dtype=dtype, count=count, offset=int(offset))


def _data_file(path: Path, where: str, location: str) -> Path:
    """The file that external data lies in: one of the model's folder."""
    if not location or "\0" in location:
        raise FormatError(f"{where}: external data without a file name")
    try:
        file = within(path.parent, location)
    except FormatError as error:
        raise FormatError(
            f"{where}: external data at {location[:80]!r} is not inside the model's folder: {error}"
        ) from None
    if not file.is_file():
        raise FormatError(f"{where}: the data file {location} is missing")
    return file
