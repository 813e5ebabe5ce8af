"""onnx, onnx-packed, onnx-dense: a whole model as one graph, with or without a key/value cache.

The way of a weight through an export, and through verify of an .onnx file:

    model_writer -> graph_export, graph_parameters -> encodings -> tensor_data
    graph_weights -> products -> constants -> graph_values -> onnx_file

The writer reads back through `graph_weights` and runs the file with `onnxruntime_check`.
"""

from dataclasses import dataclass
from typing import Literal

import onnx

from spp_fx.exporters.format import register
from spp_fx.exporters.onnx.encodings import DenseConstants, Encoding, PackedCodes, SparseInitializers
from spp_fx.exporters.onnx.model_writer import OnnxFormat
from spp_fx.options import option


@register("onnx")
@dataclass(frozen=True)
class Onnx(OnnxFormat):
    """ONNX, sparse initializers."""

    indices: Literal["smallest", "int64"] = option(
        "smallest", "Index type: the smallest that onnxruntime takes, or the standard's own."
    )

    def encoding(self, proto: onnx.ModelProto) -> Encoding:
        return SparseInitializers(self.indices)


@register("onnx-packed")
@dataclass(frozen=True)
class OnnxPacked(OnnxFormat):
    """ONNX, N:M weights packed, unpacked by standard operators."""

    def encoding(self, proto: onnx.ModelProto) -> Encoding:
        return PackedCodes()


@register("onnx-dense")
@dataclass(frozen=True)
class OnnxDense(OnnxFormat):
    """ONNX, dense constants that keep the pattern (TensorRT --sparsity=enable)."""

    def encoding(self, proto: onnx.ModelProto) -> Encoding:
        return DenseConstants(proto)
