"""Writing an ONNX graph in the memory of one tensor.

A protobuf is limited to 2 GiB, and both its writer and its reader hold all of it in memory. So the bytes of
tensors go to a data file beside the graph as they come. The graph is written last, with small tensors inside.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import GraphProto, NodeProto, SparseTensorProto, TensorProto, helper
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from spp_fx.errors import SppFxError

SINGLE_FILE_LIMIT = 2**28
"""Bytes of tensors up to which they are stored in the graph's file."""
_INLINE_BELOW = 1024  # bytes; shape inference reads small tensors (shapes, axes, tables)
_PAGE = 4096


@dataclass(frozen=True)
class GraphWriter:
    """A graph that is being written; see `graph_writer`.

    Attributes:
        graph: gets the tensors that are added.
        file: their bytes.
        unpacking: nodes that are written in front of the graph's own.
    """

    graph: GraphProto
    file: BinaryIO
    unpacking: list[NodeProto] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> int:
        """Add an initializer; returns its bytes."""
        return self.add_bits(name, onnx_type(value.dtype), value.shape, bits_of(value))

    def add_bits(self, name: str, dtype: int, dims: Sequence[int], data: npt.NDArray[Any]) -> int:
        """Add an initializer of an ONNX type, given its elements in row-major order; returns its bytes."""
        self.graph.initializer.append(self._append(name, dtype, dims, data))
        return data.nbytes

    def add_sparse(
        self,
        name: str,
        dtype: int,
        dims: Sequence[int],
        values: npt.NDArray[Any],
        positions: npt.NDArray[Any],
    ) -> int:
        """Add a sparse initializer, given its values and their linear positions; returns its bytes."""
        index_type = helper.np_dtype_to_tensor_dtype(positions.dtype)
        sparse = SparseTensorProto(
            dims=dims,
            values=self._append(name, dtype, values.shape, values),
            indices=self._append("", index_type, positions.shape, positions),
        )
        self.graph.sparse_initializer.append(sparse)
        return values.nbytes + positions.nbytes

    def _append(self, name: str, dtype: int, dims: Sequence[int], data: npt.NDArray[Any]) -> TensorProto:
        """Append a tensor to the data file; returns the TensorProto that points to its bytes."""
        file = self.file
        file.write(b"\0" * (-file.tell() % (_PAGE if data.nbytes >= 2**20 else 16)))
        tensor = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
        location = {"location": Path(file.name).name, "offset": file.tell(), "length": data.nbytes}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
        if tensor_bytes(tensor) != data.nbytes:
            raise SppFxError(
                f"{file.name}: {name}: {data.nbytes} bytes for a tensor of {tensor_bytes(tensor)}"
            )
        file.write(np.ascontiguousarray(data).data)
        return tensor


@contextmanager
def graph_writer(
    proto: onnx.ModelProto, path: Path, *, single_file_limit: int | None = None
) -> Generator[GraphWriter]:
    """Write a graph, and the tensors that the caller adds, beside it or inside it if they are small.

    onnx.save does not support sparse tensors with external data.

    Args:
        proto: the model; changed as it is written.
        path: of the graph; PATH.data is its data file.
        single_file_limit: bytes of tensors up to which everything becomes one file; `SINGLE_FILE_LIMIT` if None.

    Raises:
        SppFxError: what stays in the graph does not fit one protobuf of 2 GiB.
    """
    data_path, graph = path.with_name(f"{path.name}.data"), proto.graph
    with data_path.open("x+b") as file:
        writer = GraphWriter(graph, file)
        yield writer
        prepend(graph, writer.unpacking)
        whole = file.tell() <= (SINGLE_FILE_LIMIT if single_file_limit is None else single_file_limit)
        sparse = (tensor for each in graph.sparse_initializer for tensor in (each.values, each.indices))
        for tensor in (*graph.initializer, *sparse):
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
        data_path.unlink()


def prepend(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Put nodes in front of a graph's own."""
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *own])


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number of a torch type."""
    return int(from_torch_dtype(dtype))


def bits_of(value: Tensor) -> npt.NDArray[Any]:
    """The elements of a tensor in row-major order, as unsigned integers of their width; a view if contiguous."""
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"u{value.itemsize}")


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's data, computed from its shape: protobuf copies the data on every access."""
    itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.prod(tensor.dims) * itemsize
