"""An .onnx file and the tensors stored in it. Nothing in it is trusted, and no code that writes tensors is used."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import FunctionProto, GraphProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from spp_fx.errors import FormatError
from spp_fx.storage.folder import within
from spp_fx.storage.strict_json import regular_file_size

Array = npt.NDArray[Any]
StoredTensor = TensorProto | SparseTensorProto

TENSOR_LIMIT = 2**31
"""onnxruntime's limit of a sparse tensor's dense form, in bytes; here also the limit of its elements."""
PROTOBUF_LIMIT = 2**31
"""No parser takes a protobuf of this many bytes."""
_INDEX_TYPES = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)
_BITS = {
    number: 4 if "4" in name else 2
    for name, number in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
"""Bits of the types with several elements in a byte, of those that the installed onnx package has."""


class OnnxFile:
    """An .onnx file whose tensors are read one by one, when they are needed.

    External data is read only from files inside the file's folder. bfloat16 is read as ml_dtypes.bfloat16.

    Attributes:
        dense: initializers by name.
        sparse: sparse initializers by name.

    Raises:
        UsageError: there is no such file.
        FormatError: it is not an ONNX model; a name is missing or comes twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.proto = load_model(path)
        graph = self.proto.graph
        self.dense = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {sparse.values.name: sparse for sparse in graph.sparse_initializer}
        names = [
            *(each.name for each in graph.initializer),
            *(each.values.name for each in graph.sparse_initializer),
        ]
        for name, count in Counter(names).items():
            if not name:
                raise FormatError(f"{path}: an initializer has no name")
            if count > 1:
                raise FormatError(f"{name} ({path}): two initializers have this name")
        taken = set(names)
        for node in graph.node:
            for output in filter(None, node.output):
                if output in taken:  # a runtime may take either
                    raise FormatError(f"{output} ({path}): is made twice, the second time by {node.op_type}")
                taken.add(output)

    def read(self, name: str) -> Array:
        """The numbers of an initializer; see `read_stored`."""
        return self.read_stored(name, self.dense.get(name) or self.sparse[name])

    def read_stored(self, name: str, stored: StoredTensor) -> Array:
        """The numbers of a tensor anywhere in the file: in a subgraph, a local function, a Constant node.

        Raises:
            FormatError: indices are of another type, out of bounds, not ascending or not unique; data is missing,
                truncated, of another length than its shape needs, or outside the folder. The message names the
                tensor and the file.
        """
        if isinstance(stored, TensorProto):
            return _read(self.path, f"{name} ({self.path})", stored)
        return _read_sparse(self.path, f"{name} ({self.path})", stored)


def load_model(path: Path) -> onnx.ModelProto:
    """The protobuf of an .onnx file, external data left where it is.

    Raises:
        UsageError: there is no such file.
        FormatError: the file cannot be read or is not an ONNX model.
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


def _texts(message: Message) -> Iterator[str | bytes]:
    """The texts of a message and of those inside it: protobuf returns one that is not UTF-8 as bytes."""
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING:
            texts = getattr(message, field.name)
            yield from [texts] if isinstance(texts, str | bytes) else texts
        elif field.type == field.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            if not isinstance(inner, Message):
                for each in inner:
                    yield from _texts(each)
            elif message.HasField(field.name):
                yield from _texts(inner)


def graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes: branches, or the body of a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(body: GraphProto | FunctionProto) -> Iterator[GraphProto | FunctionProto]:
    """A graph or a function, and the graphs inside its nodes."""
    yield body
    for node in body.node:
        for graph in graphs_in(node):
            yield from all_graphs(graph)


def all_nodes(body: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """The nodes of a graph or a function, and of the graphs inside them."""
    return (node for each in all_graphs(body) for node in each.node)


def _read_sparse(path: Path, where: str, sparse: SparseTensorProto) -> Array:
    """The dense form. The standard has linear indices [nnz] and coordinates [nnz, rank]."""
    shape = tuple(sparse.dims)
    if not shape or min(shape) <= 0:
        raise FormatError(f"{where}: {list(shape)} is not the shape of a sparse tensor")
    numel = math.prod(shape)
    if numel > TENSOR_LIMIT:
        raise FormatError(
            f"{where}: {list(shape)} is larger than a sparse tensor can be, {TENSOR_LIMIT} elements"
        )
    if sparse.indices.data_type not in _INDEX_TYPES:
        raise FormatError(f"{where}: indices have type {sparse.indices.data_type}, not int8, 16, 32 or 64")
    values = _read(path, f"{where}, values", sparse.values)
    indices: npt.NDArray[np.int64] = _read(path, f"{where}, indices", sparse.indices).astype(np.int64)
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
    flat = np.zeros(numel, dtype=values.dtype)
    flat[indices] = values
    return flat.reshape(shape)


def _read(path: Path, where: str, tensor: TensorProto) -> Array:
    """The numbers of a tensor, inline or external."""
    dims = list(tensor.dims)
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError as error:
        raise FormatError(f"{where}: unknown data type {tensor.data_type}") from error
    if dtype.hasobject:
        raise FormatError(f"{where}: holds text where numbers are expected")
    if any(not 0 <= dim < 2**48 for dim in dims):
        raise FormatError(f"{where}: {dims} is not a shape")
    if tensor.HasField("segment"):
        raise FormatError(f"{where}: is one segment of a tensor, which no runtime takes")
    narrow = tensor.data_type in _BITS
    needed = -(-math.prod(dims) * _BITS.get(tensor.data_type, 8 * dtype.itemsize) // 8)
    data: Array | None = None
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _read_external(path, where, tensor, needed)
    elif tensor.HasField("raw_data"):
        data = np.frombuffer(tensor.raw_data, dtype=np.uint8)
        if data.size != needed:
            raise FormatError(f"{where}: {data.size} bytes of data, the shape {dims} needs {needed}")
    elif narrow and len(tensor.int32_data) > needed:  # each is one byte
        raise FormatError(f"{where}: {len(tensor.int32_data)} numbers are too many for {dims}")
    if data is not None and not narrow:
        return data.view(dtype).reshape(dims)
    if data is not None:
        tensor = TensorProto(dims=dims, data_type=tensor.data_type, raw_data=data.tobytes())
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: the data does not fit the shape {dims}: {error}") from error


def _read_external(path: Path, where: str, tensor: TensorProto, needed: int) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor from a file of the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
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
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    if not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length)):
        raise FormatError(f"{where}: offset {offset!r} or length {length!r} is not a number")
    if int(length) != needed:
        raise FormatError(f"{where}: {length} bytes of data, the shape {list(tensor.dims)} needs {needed}")
    if int(offset) + needed > os.path.getsize(file):
        raise FormatError(f"{where}: {file.name} is truncated, it ends before byte {int(offset) + needed}")
    return np.fromfile(file, dtype=np.uint8, count=needed, offset=int(offset))
