"""Sparse initializers: dense weights of an ONNX model as SparseTensorProto, written.

A SparseTensorProto holds the non-zero values and their linear (row-major) positions. onnxruntime expands
it when the model is loaded, so it saves room on disk and nothing else, and only where enough is zero.

onnx.save, onnx_ir and the onnxscript optimizer drop sparse initializers or cannot move them to external
data; this step therefore comes last and writes the protobuf itself. `onnx_reader` reads it back.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from spp_fx.errors import SppFxError

IndexType = Literal["int8", "int16", "int32", "int64"]
Indices = Literal["smallest", "int64"]

SINGLE_FILE_LIMIT = 2**31 - 2**26  # bytes of tensor data; protobuf stops at 2 GiB, the graph needs some too
TENSOR_LIMIT = 2**31  # bytes; onnxruntime refuses a sparse tensor whose dense form is larger

_ONNX_INDEX: dict[IndexType, int] = {
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
_VALUE_BITS: dict[int, tuple[str, Any, int]] = {  # ONNX type -> name, integer view, all bits but the sign
    TensorProto.FLOAT: ("float32", np.uint32, 0x7FFFFFFF),
    TensorProto.FLOAT16: ("float16", np.uint16, 0x7FFF),
    TensorProto.BFLOAT16: ("bfloat16", np.uint16, 0x7FFF),
}
_INLINE_BELOW = 1024  # bytes; smaller tensors (shapes, axes) stay in the protobuf, shape inference needs them
_PAGE = 4096


@dataclass(frozen=True)
class SparsifiedTensor:
    """What became of one named weight. Bytes are tensor data, without some tens of bytes of protobuf.

    `index_type` and `sparse_bytes` are None where the weight was left dense, and `reason` says why.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    dense_bytes: int
    sparse_bytes: int | None
    index_type: IndexType | None
    reason: str | None = None


@dataclass(frozen=True)
class SizeReport:
    """Honest sizes of a whole model, tensor data in bytes.

    `dense_bytes` counts every initializer dense; `sparse_bytes` counts them as they are now; `other_bytes`
    is the part of both that was never asked to be sparse. `larger` names the tensors that grew.
    """

    dense_bytes: int
    sparse_bytes: int
    other_bytes: int
    larger: tuple[str, ...]
    left_dense: dict[str, str]


def index_type_for(numel: int, indices: Indices = "smallest") -> IndexType:
    """The type of the positions of a tensor of `numel` elements.

    'int64' is what the ONNX standard and its checker ask for; 'smallest' is the smallest signed type that
    holds numel - 1, which onnxruntime loads as well (it takes no unsigned type).
    """
    if indices == "int64":
        return "int64"
    if numel <= 2**7:
        return "int8"
    if numel <= 2**15:
        return "int16"
    return "int32" if numel <= 2**31 else "int64"


def sparse_bytes(numel: int, nnz: int, itemsize: int, indices: Indices = "smallest") -> int:
    """Bytes of `nnz` values of `itemsize` bytes and their positions; known before anything is written."""
    return nnz * (itemsize + np.dtype(index_type_for(numel, indices)).itemsize)


def sparsify(
    model: onnx.ModelProto, names: Iterable[str], indices: Indices = "smallest"
) -> tuple[onnx.ModelProto, tuple[SparsifiedTensor, ...]]:
    """A copy of `model` whose initializers `names` are sparse.

    Values keep their type and bits, in row-major order; -0.0 counts as zero, NaN and subnormals do not.
    Left dense, with the reason: types other than fp32, fp16, bf16; graph inputs; weights without a zero;
    weights that do not fit 2 GiB. A weight that grows is converted all the same (see `size_report`).

    Args:
        model: unchanged; holds its tensors inside (no external data). Drop it afterwards: protobuf frees
            no part of a message before the whole, so a copy is what keeps the peak at two models.
        names: initializers of `model`, each once.

    Raises:
        SppFxError: a name is no dense initializer of the model.
    """
    wanted = list(dict.fromkeys(names))
    known = {tensor.name for tensor in model.graph.initializer}
    for name in wanted:
        if name not in known:
            raise SppFxError(f"{name} is no dense initializer of the ONNX graph")
    inputs = {value.name for value in model.graph.input}
    result = _shell(model)
    reports: dict[str, SparsifiedTensor] = {}
    chosen = set(wanted)
    for tensor in model.graph.initializer:
        if tensor.name in chosen:
            report, sparse = _sparsify_one(tensor, indices, tensor.name in inputs)
            reports[tensor.name] = report
            if sparse is not None:
                result.graph.sparse_initializer.append(sparse)
                continue
        result.graph.initializer.append(tensor)
    result.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    return result, tuple(reports[name] for name in wanted)


def size_report(model: onnx.ModelProto, tensors: Sequence[SparsifiedTensor]) -> SizeReport:
    """Compare the whole of a sparsified model with the same model all dense."""
    converted = {t.name: t for t in tensors}
    other = sum(_data_bytes(t) for t in model.graph.initializer if t.name not in converted)
    dense = sum(t.dense_bytes for t in tensors)
    now = sum(t.dense_bytes if t.sparse_bytes is None else t.sparse_bytes for t in tensors)
    return SizeReport(
        dense_bytes=other + dense,
        sparse_bytes=other + now,
        other_bytes=other,
        larger=tuple(
            t.name for t in tensors if t.sparse_bytes is not None and t.sparse_bytes > t.dense_bytes
        ),
        left_dense={t.name: t.reason for t in tensors if t.reason is not None},
    )


def save(
    model: onnx.ModelProto, path: Path, *, external_threshold: int = SINGLE_FILE_LIMIT
) -> tuple[Path, ...]:
    """Write the model as one file or, when it is too large for one protobuf, as two.

    The second, `<path>.data`, holds the raw bytes of dense initializers, sparse values and sparse indices
    of 1 KiB and more; those of 1 MiB and more start on a page of 4 KiB.

    Args:
        model: unchanged; holds its tensors inside (no external data).
        external_threshold: bytes of tensor data above which they go into the second file. onnxruntime reads
            sparse tensors from there; onnx.checker cannot (see `onnx_check.check_standard`).

    Returns:
        The files written: the model, and the data file if there is one. An existing file is replaced.

    Raises:
        SppFxError: what has to stay in the protobuf is over 2 GiB.
    """
    payload = sum(_data_bytes(tensor) for tensor in _tensors(model))
    data_path = path.with_name(path.name + ".data")
    written: tuple[Path, ...] = (path,)
    if payload > external_threshold:
        with data_path.open("wb") as data:
            model = _externalize(model, data, data_path.name)
        written = (path, data_path)
    try:
        serialized = model.SerializeToString(deterministic=True)
    except (ValueError, MemoryError) as error:
        raise SppFxError(f"{path}: the graph does not fit one protobuf of 2 GiB: {error}") from error
    if len(serialized) >= 2**31:
        raise SppFxError(f"{path}: the graph does not fit one protobuf of 2 GiB ({len(serialized)} bytes)")
    path.write_bytes(serialized)
    return written


def _sparsify_one(
    tensor: TensorProto, indices: Indices, is_input: bool
) -> tuple[SparsifiedTensor, onnx.SparseTensorProto | None]:
    shape = tuple(tensor.dims)
    numel = math.prod(shape)
    if tensor.data_type not in _VALUE_BITS:
        dtype = TensorProto.DataType.Name(tensor.data_type).lower()
        reason = f"{dtype} is none of the types spp-fx writes sparse (float32, float16, bfloat16)"
        size = _data_bytes(tensor)
        return SparsifiedTensor(tensor.name, shape, dtype, numel, size, None, None, reason), None
    dtype, bits_type, magnitude = _VALUE_BITS[tensor.data_type]
    bits: npt.NDArray[Any] = np.frombuffer(_raw(tensor), dtype=bits_type)
    positions = np.flatnonzero(bits & magnitude)
    nnz = int(positions.size)
    index_type = index_type_for(numel, indices)
    largest = max(bits.nbytes, nnz * np.dtype(index_type).itemsize)
    reason = None
    if is_input:
        reason = "it is a graph input as well, and those cannot be sparse"
    elif nnz == numel:
        reason = "it holds no zero"
    elif largest >= TENSOR_LIMIT:
        reason = f"it takes {largest} bytes, onnxruntime and protobuf stop at {TENSOR_LIMIT} for one tensor"
    if reason is not None:
        return SparsifiedTensor(tensor.name, shape, dtype, nnz, bits.nbytes, None, None, reason), None
    sparse = onnx.SparseTensorProto(dims=shape)
    sparse.values.name = tensor.name
    sparse.values.data_type = tensor.data_type
    sparse.values.dims.append(nnz)
    sparse.values.raw_data = bits[positions].tobytes()
    sparse.indices.data_type = _ONNX_INDEX[index_type]
    sparse.indices.dims.append(nnz)
    sparse.indices.raw_data = positions.astype(index_type).tobytes()
    size = sparse_bytes(numel, nnz, bits.itemsize, indices)
    return SparsifiedTensor(tensor.name, shape, dtype, nnz, bits.nbytes, size, index_type), sparse


def _raw(tensor: TensorProto) -> bytes:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise SppFxError(f"{tensor.name} is in an external file; load the model with its data first")
    return tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()


def _data_bytes(tensor: TensorProto) -> int:
    """Counted from the shape: protobuf copies the data on every look at it."""
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.prod(tensor.dims) * itemsize


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices


def _shell(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its initializers."""
    shell = onnx.ModelProto()
    _copy_fields(model, shell, skip={"graph"})
    _copy_fields(model.graph, shell.graph, skip={"initializer", "sparse_initializer"})
    return shell


def _copy_fields(source: Any, target: Any, skip: set[str]) -> None:
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if hasattr(value, "MergeFrom"):  # a message or a repeated field
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)


def _externalize(model: onnx.ModelProto, data: BinaryIO, location: str) -> onnx.ModelProto:
    shell = _shell(model)
    for tensor in model.graph.initializer:
        _move(tensor, shell.graph.initializer.add(), data, location)
    for sparse in model.graph.sparse_initializer:
        moved = shell.graph.sparse_initializer.add(dims=sparse.dims)
        _move(sparse.values, moved.values, data, location)
        _move(sparse.indices, moved.indices, data, location)
    return shell


def _move(tensor: TensorProto, target: TensorProto, data: BinaryIO, location: str) -> None:
    raw = _raw(tensor)
    if len(raw) < _INLINE_BELOW:
        target.CopyFrom(tensor)
        return
    data.write(b"\0" * (-data.tell() % (_PAGE if len(raw) >= 2**20 else 16)))
    offset = data.tell()
    data.write(raw)
    target.name, target.data_type = tensor.name, tensor.data_type
    target.dims.extend(tensor.dims)
    target.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(raw))):
        target.external_data.add(key=key, value=str(value))
