"""onnx, onnx-packed, onnx-dense: a whole model as one graph, with or without a key/value cache."""

from spp_fx.exporters.format import Format, register
from spp_fx.exporters.onnx.dense import DenseConstants
from spp_fx.exporters.onnx.packed import Packing
from spp_fx.exporters.onnx.sparse import SparseInitializers
from spp_fx.exporters.onnx.weights import GRAPH, read, read_graph
from spp_fx.exporters.onnx.writer import MakeEncoding, writer

__all__ = ["FORMATS", "GRAPH", "read", "read_graph"]


def _format(name: str, make: MakeEncoding, *options: str) -> Format:
    common = {"dtype", "with_past", "compare_logits"}
    return register(Format(name, writer(name, make), read, frozenset(common | set(options))))


FORMATS = (
    _format("onnx", lambda settings, _: SparseInitializers(settings.indices), "indices"),
    _format("onnx-packed", lambda _, __: Packing()),
    _format("onnx-dense", lambda _, proto: DenseConstants(proto)),
)
