"""What an ONNX format decides: how one weight with sites is put into the graph."""

from dataclasses import dataclass, field
from typing import Protocol

from onnx import NodeProto, SparseTensorProto, TensorProto, ValueInfoProto
from torch import Tensor

from spp_fx.exporters.onnx.data import DataFile
from spp_fx.exporters.onnx.graph import GraphParameter
from spp_fx.exporters.onnx.parameters import SparseParameter


@dataclass(frozen=True)
class Encoded:
    """A weight as a graph holds it.

    Attributes:
        layout: of its sites, for the manifest; `dense` where the format could not take it.
        nbytes: of its data.
        reason: why it is dense, or what else is to be known.
        tensors: its dense initializers.
        sparse: its sparse initializer.
        nodes: what computes it of the initializers; the last one's output has the weight's name.
        swapped: the initializer holds the weight with its last two dimensions swapped.
        negative_zeros: zeros of negative sign that were written as +0.
        details: what else the manifest says of each of its sites.
    """

    layout: str
    nbytes: int
    reason: str | None = None
    tensors: tuple[TensorProto, ...] = ()
    sparse: SparseTensorProto | None = None
    nodes: tuple[NodeProto, ...] = ()
    swapped: bool = False
    negative_zeros: int = 0
    details: dict[str, int | str] = field(default_factory=dict)


class Encoding(Protocol):
    """One format's way to put weights into a graph, for one export."""

    @property
    def layout(self) -> str:
        """Of the sites that it takes, for the manifest."""
        ...

    def refusal(self, parameter: GraphParameter, sites: SparseParameter) -> str | None:
        """Why a weight stays a plain dense constant; None where it does not."""
        ...

    def size(self, parameter: GraphParameter, sites: SparseParameter) -> int:
        """Bytes that `encode` will take, known before anything is read; for a weight without refusal."""
        ...

    def outline(
        self, parameter: GraphParameter, sites: SparseParameter
    ) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        """What `encode` will put into the graph, its numbers as inputs; for a weight without refusal."""
        ...

    def encode(
        self, parameter: GraphParameter, sites: SparseParameter, weight: Tensor, data: DataFile
    ) -> Encoded:
        """Write the numbers of a weight (in the graph's shape and dtype) and say how the graph holds them."""
        ...

    def constants(self) -> tuple[TensorProto, ...]:
        """Initializers that weights share, after the last of them."""
        ...


def dense(parameter: GraphParameter, weight: Tensor, data: DataFile, reason: str | None) -> Encoded:
    """A weight as a plain dense constant."""
    tensor = data.add_tensor(parameter.name, weight)
    return Encoded("dense", weight.nbytes, reason, (tensor,))
