"""onnx, onnx-packed, onnx-dense: a whole model as one graph, with or without a key/value cache.

The way of a weight through an export, and through verify of an .onnx file:

    model_writer -> graph_export, graph_parameters -> encodings -> graph_writer
    graph_weights -> products -> constants -> graph_values -> onnx_file

The writer reads back through `graph_weights` and runs the file with `onnxruntime_check`.
"""

from spp_fx.exporters.format import Format, register
from spp_fx.exporters.onnx.encodings import DenseConstants, PackedCodes, SparseInitializers
from spp_fx.exporters.onnx.graph_weights import GRAPH, read, read_graph
from spp_fx.exporters.onnx.model_writer import MakeEncoding, writer

__all__ = ["FORMATS", "GRAPH", "read", "read_graph"]


def _format(name: str, make: MakeEncoding, *options: str) -> Format:
    common = {"dtype", "with_past", "compare_logits"}
    return register(Format(name, writer(name, make), read, frozenset(common | set(options))))


FORMATS = (
    _format("onnx", lambda settings: SparseInitializers(settings.indices), "indices"),
    _format("onnx-packed", lambda _: PackedCodes()),
    _format("onnx-dense", lambda _: DenseConstants()),
)
