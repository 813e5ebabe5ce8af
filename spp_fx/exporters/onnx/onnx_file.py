"""An .onnx file and its weights: dense, sparse, or unpacked from values and codes. Everything is checked.

This shares no code with the writer: written files are checked with it. A packed weight is a chain of operators.
Every operator of the chain must be exactly the one that is expected here, its constants are read and checked, and
numpy computes what the operators would compute.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from spp_fx.errors import FormatError
from spp_fx.storage.folder import within
from spp_fx.storage.strict_json import regular_file_size

Array = npt.NDArray[Any]

TENSOR_LIMIT = 2**31
"""onnxruntime's limit of a sparse tensor's dense form, in bytes; here also the limit of its elements."""
PROTOBUF_LIMIT = 2**31
"""No parser takes a protobuf of this many bytes."""
_WEIGHT_TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
}
_INDEX_TYPES = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)
_FLOATING = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
_BITS = {
    number: 4 if "4" in name else 2
    for name, number in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
"""Bits of the types with several elements in a byte, as far as the onnx package has them."""
_MAX_GROWTH = 64
"""Elements of an unpacked weight for each stored value, at most: it bounds the memory that a file can ask for."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackedWeight:
    """A weight that the graph scatters from constants.

    Attributes:
        name: of the value that the weight is.
        values, codes, table, runs, shape: names of its constants.
        perm: of the Transpose at the end, None if there is none.
    """

    name: str
    values: str
    codes: str
    table: str
    runs: str
    shape: str
    perm: tuple[int, ...] | None


class OnnxFile:
    """An .onnx file whose tensors are read one by one, when they are asked for.

    External data is read only from files inside the file's folder. bfloat16 comes as ml_dtypes.bfloat16.

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
        seen: set[str] = set()
        for name in (
            *(t.name for t in graph.initializer),
            *(s.values.name for s in graph.sparse_initializer),
        ):
            if not name:
                raise FormatError(f"{path}: an initializer has no name")
            if name in seen:
                raise FormatError(f"{name} ({path}): two initializers have this name")
            seen.add(name)
        self.dense = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {sparse.values.name: sparse for sparse in graph.sparse_initializer}
        for node in graph.node:
            for output in node.output:
                if output in seen:  # a runtime may take either
                    raise FormatError(f"{output} ({path}): is made twice, the second time by {node.op_type}")
                if output:
                    seen.add(output)

    @cached_property
    def packed(self) -> dict[str, PackedWeight]:
        """Weights that the graph scatters from constants, by the name of the value that they become.

        Raises:
            FormatError: a constant is scattered in a way that is not known, or the result is not used.
        """
        nodes = self.proto.graph.node
        made = {output: node for node in nodes for output in node.output}
        readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for value in node.input:
                readers.setdefault(value, []).append(node)
        chains = [
            _PackedChain(self, node, made, readers).follow()
            for node in nodes
            if node.op_type == "ScatterElements" and len(node.input) == 3 and node.input[2] in self.dense
        ]
        return {chain.name: chain for chain in chains}

    @property
    def packed_parts(self) -> set[str]:
        """The initializers that packed weights are computed from."""
        return {part for each in self.packed.values() for part in (each.values, each.codes, each.table)}

    def read(self, name: str) -> Array:
        """The numbers of an initializer or a packed weight, in full.

        Raises:
            FormatError: as `read_stored`.
        """
        return self.read_stored(name, self.dense.get(name) or self.sparse.get(name) or self.packed[name])

    def read_stored(self, name: str, stored: TensorProto | SparseTensorProto | PackedWeight) -> Array:
        """As `read`, of a tensor anywhere in the file: in a subgraph, a local function, a Constant node.

        Raises:
            FormatError: indices are of another type, out of bounds, not ascending or not unique; data is missing,
                truncated, of another length than its shape needs, or outside the folder; constants of a packed
                weight do not belong together. The message names the tensor and the file.
        """
        if isinstance(stored, PackedWeight):
            return _unpack(self, stored)
        where = f"{name} ({self.path})"
        if isinstance(stored, SparseTensorProto):
            values, indices = _read_sparse(self.path, where, stored)
            flat = np.zeros(math.prod(stored.dims), dtype=values.dtype)
            flat[indices] = values
            return flat.reshape(tuple(stored.dims))
        return _read(self.path, where, stored)

    def read_sparse(self, name: str) -> tuple[Array, npt.NDArray[np.int64]]:
        """Values (nnz,) and linear positions (nnz,), ascending and unique, of a sparse initializer.

        Raises:
            FormatError: as `read_stored`.
        """
        return _read_sparse(self.path, f"{name} ({self.path})", self.sparse[name])

    def is_weight(self, name: str) -> bool:
        """Whether an initializer is sparse, or has two dimensions or more and a type that weights have."""
        tensor = self.dense.get(name)
        return name in self.sparse or (
            tensor is not None and len(tensor.dims) >= 2 and tensor.data_type in _WEIGHT_TYPES
        )


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


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every text that is used later: protobuf returns those that are not UTF-8 as bytes."""
    for entry in (*model.opset_import, *(each for f in model.functions for each in f.opset_import)):
        yield entry.domain
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
    bodies = [model.graph, *model.functions]
    for body in bodies:  # grows by the graphs inside its nodes
        tensors: list[TensorProto] = []
        sparse: list[SparseTensorProto] = []
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


def _read_sparse(path: Path, where: str, sparse: SparseTensorProto) -> tuple[Array, npt.NDArray[np.int64]]:
    """Values and linear positions. The standard has linear indices [nnz] and coordinates [nnz, rank]."""
    shape = tuple(sparse.dims)
    if not shape or min(shape) <= 0:
        raise FormatError(f"{where}: {list(shape)} is no shape of a sparse tensor")
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
    return values, indices


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
        raise FormatError(f"{where}: {dims} is no shape")
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
        raise FormatError(f"{where}: offset {offset!r} or length {length!r} is no number")
    if int(length) != needed:
        raise FormatError(f"{where}: {length} bytes of data, the shape {list(tensor.dims)} needs {needed}")
    if int(offset) + needed > os.path.getsize(file):
        raise FormatError(f"{where}: {file.name} is truncated, it ends before byte {int(offset) + needed}")
    return np.fromfile(file, dtype=np.uint8, count=needed, offset=int(offset))


@dataclass(frozen=True)
class _PackedChain:
    """A chain of operators, followed from its ScatterElements in both directions."""

    file: OnnxFile
    scatter: NodeProto
    made: Mapping[str, NodeProto]
    readers: Mapping[str, list[NodeProto]]

    def follow(self) -> PackedWeight:
        zeros, positions, values = self._inputs(self.scatter, 3, {"axis": (1,), "reduction": (b"none", None)})
        background, cast = self._producer(zeros, "Cast", "ConstantOfShape"), None
        if background.op_type == "Cast":
            (zeros,) = self._inputs(background, 1, {"to": _FLOATING, "saturate": (1, None)})
            cast = self._attributes(background)["to"]
            background = self._producer(zeros, "ConstantOfShape")
        (runs,) = self._inputs(background, 1, {"value": None})
        made = self._check_zero(background)
        if self.file.dense[values].data_type != (cast or made):
            self._refuse("its values are not of the type of the zeros that they are scattered into")
        table, numbers = self._inputs(self._producer(positions, "Gather"), 2, {"axis": (0, None)})
        (codes,) = self._inputs(
            self._producer(numbers, "Cast"),
            1,
            {"to": (TensorProto.INT32, TensorProto.INT64), "saturate": (1, None)},
        )
        reshape = self._reader(self.scatter, "Reshape")
        _, shape = self._inputs(reshape, 2, {"allowzero": (0, None)})
        last, perm = reshape, None
        if self._output(reshape).endswith(".canonical"):
            last = self._reader(reshape, "Transpose")
            self._inputs(last, 1, {"perm": None})
            perm = tuple(int(axis) for axis in self._attributes(last).get("perm", ()))
        name = self._output(last)
        if not self.readers.get(name):
            self._refuse("nothing reads the weight that is unpacked")
        return PackedWeight(name, values, codes, table, runs, shape, perm)

    def _inputs(self, node: NodeProto, count: int, known: dict[str, tuple[Any, ...] | None]) -> list[str]:
        """The inputs of an operator that has so many, and no attribute but those known with such a value."""
        attributes = self._attributes(node)
        if len(node.input) != count or len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
            self._refuse(f"{node.op_type} has {len(node.input)} inputs, expected {count}")
        if stray := attributes.keys() - known.keys():
            self._refuse(f"{node.op_type} has an attribute {min(stray)}")
        for name, allowed in known.items():
            if allowed is not None and attributes.get(name) not in allowed:
                self._refuse(f"{node.op_type} has {name} {attributes.get(name)}")
        return list(node.input)

    def _attributes(self, node: NodeProto) -> dict[str, Any]:
        try:
            return {each.name: helper.get_attribute_value(each) for each in node.attribute}
        except ValueError:
            self._refuse(f"{node.op_type} has an attribute without a value")

    def _check_zero(self, node: NodeProto) -> int:
        """The type of a background that is zero."""
        value = self._attributes(node).get("value")
        if value is None:
            return TensorProto.FLOAT
        if isinstance(value, TensorProto) and value.data_location == TensorProto.EXTERNAL:
            self._refuse("its background lies in another file")
        try:
            zero = isinstance(value, TensorProto) and not numpy_helper.to_array(value).tobytes().strip(b"\0")
        except (ValueError, TypeError, KeyError):
            zero = False
        if not zero:
            self._refuse("its background is not zero")
        return value.data_type

    def _producer(self, value: str, *op_types: str) -> NodeProto:
        node = self.made.get(value)
        if node is None or node.op_type not in op_types:
            self._refuse(f"{value} is not made by {' or '.join(op_types)}")
        return node

    def _reader(self, of: NodeProto, op_type: str) -> NodeProto:
        value = self._output(of)
        nodes = self.readers.get(value, [])
        if len(nodes) != 1 or nodes[0].op_type != op_type or nodes[0].input[0] != value:
            self._refuse(f"{value} is not read by one {op_type}")
        return nodes[0]

    def _output(self, node: NodeProto) -> str:
        if len(node.output) != 1:
            self._refuse(f"{node.op_type} has {len(node.output)} outputs")
        return node.output[0]

    def _refuse(self, reason: str) -> NoReturn:
        where = self.scatter.output[0] if self.scatter.output else self.scatter.name
        raise FormatError(f"{where} ({self.file.path}): {reason}; the packing is not a known one")


def _unpack(file: OnnxFile, chain: PackedWeight) -> Array:
    """The weight that a chain computes, in the shape of its value."""

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{chain.name} ({file.path}): {reason}")

    def constant(value: str, kinds: str, rank: int) -> Array:
        if value not in file.dense:
            refuse(f"{value} is no constant")
        array = file.read(value)
        if array.ndim != rank or (kinds and array.dtype.kind not in kinds):
            refuse(f"{value} is {array.dtype} of {array.ndim} dimensions, which unpacking does not expect")
        return array

    values = constant(chain.values, "", 2)
    codes = constant(chain.codes, "u", 1)
    table = constant(chain.table, "i", 2)
    runs = constant(chain.runs, "i", 1).tolist()
    shape = constant(chain.shape, "i", 1).tolist()
    if values.shape != (codes.size, table.shape[1]) or len(runs) != 2 or runs[0] != codes.size:
        refuse(f"{list(values.shape)} values, {codes.size} codes and runs of {runs} do not belong together")
    width = int(runs[1])
    if not 0 < width <= _MAX_GROWTH * max(1, table.shape[1]):
        refuse(f"a run of {width} elements for {table.shape[1]} values")
    if min(shape, default=0) <= 0 or int(np.prod(shape, dtype=object)) != codes.size * width:
        refuse(f"its shape {shape} is not that of {codes.size} runs of {width}")
    if codes.size and int(codes.max()) >= len(table):
        refuse(f"code {int(codes.max())} is past the table's {len(table)} rows")
    if table.size and (table.min() < 0 or table.max() >= width or (np.diff(table, axis=1) <= 0).any()):
        refuse(f"its table does not list ascending positions below {width}")
    if chain.perm is not None and sorted(chain.perm) != list(range(len(shape))):
        refuse(f"its dimensions {shape} cannot be put in the order {list(chain.perm)}")
    dense = np.zeros((codes.size, width), dtype=values.dtype)
    step = max(1, _CHUNK // width)
    for start in range(0, codes.size, step):
        run = slice(start, start + step)
        np.put_along_axis(dense[run], table[codes[run]].astype(np.int64), values[run], axis=1)
    result = dense.reshape(shape)
    return result if chain.perm is None else result.transpose(chain.perm)
