"""onnx-dense: sparse weights as dense constants, right where a matrix product reads them.

TensorRT (--sparsity=enable) finds the pattern itself, in constants that a MatMul or Gemm reads. Exported
graphs have a Transpose between weight and product; here the constant is written transposed instead, so
that groups run along the product's inner dimension before any optimiser has looked at the graph. The manifest
says of each site whether sparse tensor cores can take it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto
from torch import Tensor

from spp_fx.exporters.onnx.data import DataFile
from spp_fx.exporters.onnx.encoding import Encoded
from spp_fx.exporters.onnx.graph import GraphParameter
from spp_fx.exporters.onnx.parameters import SparseParameter, dtype_of
from spp_fx.sparsity.pattern import NM, implies, parse_pattern

ALIGNMENT = {4: 8, 2: 16, 1: 32}
"""Bytes of an element -> what rows and columns are a multiple of, where sparse tensor cores take a matrix:
what NVIDIA's documentation of cuSPARSELt asks of a structured matrix."""


@dataclass(frozen=True)
class DenseConstants:
    """Each weight as a dense constant. `proto` is changed: transpositions of weights are taken out of it."""

    proto: onnx.ModelProto
    layout: str = "dense_constant"

    def refusal(self, parameter: GraphParameter, sites: SparseParameter) -> str | None:
        return None

    def size(self, parameter: GraphParameter, sites: SparseParameter) -> int:
        return math.prod(parameter.shape) * dtype_of(parameter).itemsize

    def outline(
        self, parameter: GraphParameter, sites: SparseParameter
    ) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        return [parameter.value_info], []

    def encode(
        self, parameter: GraphParameter, sites: SparseParameter, weight: Tensor, data: DataFile
    ) -> Encoded:
        name = parameter.name
        readers = list(_readers(self.proto, name))
        swapped = weight.ndim == 2 and bool(readers) and all(_is_transpose(node) for node in readers)
        if swapped:
            weight = weight.transpose(0, 1)
            _replace(self.proto, readers, name)
            readers = list(_readers(self.proto, name))
        tensor = data.add_tensor(name, weight)
        reason = why_not_sparse(parameter, sites, readers)
        details: dict[str, int | str] = {"tensorrt": "dense" if reason else "sparse"}
        return Encoded(
            self.layout,
            weight.nbytes,
            reason and f"TensorRT runs it dense: {reason}",
            tensors=(tensor,),
            swapped=swapped,
            details=details,
        )

    def constants(self) -> tuple[TensorProto, ...]:
        return ()


def why_not_sparse(parameter: GraphParameter, sites: SparseParameter, readers: list[NodeProto]) -> str | None:
    """Why TensorRT's sparse kernels cannot take a weight; None where they can."""
    if sites.pattern is None:
        return "its rows do not have one pattern"
    if not implies(parse_pattern(sites.pattern), NM(2, 4)):
        return f"the pattern is {sites.pattern}, sparse tensor cores take 2:4"
    odd = sorted({node.op_type for node in readers if node.op_type not in ("MatMul", "Gemm")})
    if odd or not readers:
        return f"read by {', '.join(odd) or 'nothing'}, not by a MatMul or Gemm"
    step = ALIGNMENT.get(dtype_of(parameter).itemsize)
    if step is None:
        return f"sparse tensor cores do not take {str(dtype_of(parameter)).removeprefix('torch.')}"
    if any(size % step for size in parameter.shape):
        return f"{' x '.join(map(str, parameter.shape))} is not in multiples of {step}"
    return None


def _readers(proto: onnx.ModelProto, name: str) -> Iterator[NodeProto]:
    """The nodes that read a value, those of nested graphs included."""
    graphs = [proto.graph]
    for graph in graphs:
        for node in graph.node:
            if name in node.input:
                yield node
            graphs.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))


def _is_transpose(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]


def _replace(proto: onnx.ModelProto, transposes: list[NodeProto], name: str) -> None:
    """Let the readers of some transpositions read `name` instead, and drop those."""
    results = {node.output[0] for node in transposes}
    for result in results:
        for node in list(_readers(proto, result)):
            for at, value in enumerate(node.input):
                if value == result:
                    node.input[at] = name
    graphs = [proto.graph]
    for graph in graphs:
        for node in list(graph.node):
            graphs.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
            if node.output and node.output[0] in results:
                graph.node.remove(node)
