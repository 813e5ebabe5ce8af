"""onnx: the whole model as one graph, its sparse weights as sparse initializers.

A SparseTensorProto holds the non-zero values and their linear (row-major) positions. onnxruntime expands
it when the model is loaded, so it saves room on disk and nothing else, and only where enough is zero: at
2:4 a 16-bit model grows. Zeros of negative sign are kept as values.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, SparseTensorProto, TensorProto, ValueInfoProto
from torch import Tensor

from spp_fx.exporters.onnx.data import TYPES, DataFile, bytes_of
from spp_fx.exporters.onnx.encoding import Encoded
from spp_fx.exporters.onnx.graph import GraphParameter
from spp_fx.exporters.onnx.parameters import SparseParameter, dtype_of
from spp_fx.exporters.onnx.reader import TENSOR_LIMIT

IndexType = Literal["int8", "int16", "int32", "int64"]
Indices = Literal["smallest", "int64"]

_INDEX: dict[IndexType, int] = {
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK = 1 << 20  # elements looked at together


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


@dataclass(frozen=True)
class SparseInitializers:
    """Each weight as a sparse initializer."""

    indices: Indices
    layout: str = "sparse_initializer"

    def refusal(self, parameter: GraphParameter, sites: SparseParameter) -> str | None:
        """A weight without zeros, or one that is too large for a sparse tensor."""
        numel = math.prod(parameter.shape)
        if sites.whole and sites.nnz == numel:
            return "it holds no zero"
        itemsize = dtype_of(parameter).itemsize
        # As many positions as there are elements where rows belong to no site: nobody counted theirs.
        count = sites.nnz if sites.whole else numel
        largest = max(numel * itemsize, count * np.dtype(index_type_for(numel, self.indices)).itemsize)
        if largest >= TENSOR_LIMIT:
            return f"it takes {largest} bytes, onnxruntime and protobuf stop at {TENSOR_LIMIT} for one tensor"
        return None

    def size(self, parameter: GraphParameter, sites: SparseParameter) -> int:
        numel = math.prod(parameter.shape)
        nnz = sites.nnz if sites.whole else numel
        return sparse_bytes(numel, nnz, dtype_of(parameter).itemsize, self.indices)

    def outline(
        self, parameter: GraphParameter, sites: SparseParameter
    ) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        return [parameter.value_info], []

    def encode(
        self, parameter: GraphParameter, sites: SparseParameter, weight: Tensor, data: DataFile
    ) -> Encoded:
        values, positions = take_apart(weight, index_type_for(weight.numel(), self.indices))
        sparse = SparseTensorProto(dims=parameter.shape)
        index_type = index_type_for(weight.numel(), self.indices)
        sparse.values.CopyFrom(data.add(parameter.name, TYPES[weight.dtype], [len(values)], [values]))
        sparse.indices.CopyFrom(data.add("", _INDEX[index_type], [len(positions)], [positions]))
        details: dict[str, int | str] = {"index_type": index_type}
        return Encoded(self.layout, values.nbytes + positions.nbytes, sparse=sparse, details=details)

    def constants(self) -> tuple[TensorProto, ...]:
        return ()


def take_apart(weight: Tensor, index_type: IndexType) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The entries of a weight that are not all zero bits, and their linear positions.

    Args:
        weight: any shape and dtype; of 2, 4, ... bytes an element.
        index_type: of the positions.

    Returns:
        Values (nnz,) as unsigned integers of the element's width and positions (nnz,), ascending.
    """
    flat: npt.NDArray[Any] = bytes_of(weight).view(_UNSIGNED[weight.itemsize])
    starts = range(0, flat.size, _CHUNK)
    counts = [int(np.count_nonzero(flat[start : start + _CHUNK])) for start in starts]
    values = np.empty(sum(counts), dtype=flat.dtype)
    positions = np.empty(sum(counts), dtype=index_type)
    at = 0
    for start, count in zip(starts, counts, strict=True):
        found = np.flatnonzero(flat[start : start + _CHUNK])
        values[at : at + count] = flat[start : start + _CHUNK][found]
        positions[at : at + count] = found + start
        at += count
    return values, positions
