"""onnx, onnx-packed, onnx-dense: a whole model as one graph, with or without a key/value cache.

The path of a weight through an export, and through verify of an .onnx file:

    model_writer -> graph_export, graph_parameters -> encodings -> graph_writer
    graph_weights -> products -> constants -> graph_values -> onnx_file

The writer reads back through `graph_weights` and runs the file with `onnxruntime_check`. It is imported on first use,
since it imports torch.onnx and onnxruntime.
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spp_fx.exporters.format import Format, RoundTo, Say, Source, Tick, register
from spp_fx.exporters.manifest import Manifest
from spp_fx.options import option
from spp_fx.sparsity.weights import Weights

if TYPE_CHECKING:
    from spp_fx.exporters.onnx.encodings import Encoding


@dataclass(frozen=True)
class OnnxFormat(Format):
    """An ONNX format; each of them adds an encoding of weights."""

    program = True
    dtype: RoundTo | None = option(None, "Round the weights to this type.")
    task: str | None = option(
        None,
        "What the graph computes, such as image-text-to-text. Default: what config.json says; causal-lm for language "
        "models that also see images.",
    )
    with_past: bool = option(False, "ONNX graph with a key/value cache, under Optimum's names.")
    compare_logits: bool | None = option(
        None,
        "Run the written graph and compare its outputs with the model's. Default: models below 1 GB.",
    )

    @abstractmethod
    def encoding(self) -> "Encoding":
        """How the weights of one export are encoded."""

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Weights:
        from spp_fx.exporters.onnx.graph_weights import read

        return read(folder, manifest)

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        from spp_fx.exporters.onnx.model_writer import write_model

        return write_model(self, source, folder, tick, say)


@register("onnx")
@dataclass(frozen=True)
class Onnx(OnnxFormat):
    """ONNX, sparse initializers."""

    indices: Literal["smallest", "int64"] = option(
        "smallest", "Index type: the smallest that onnxruntime takes, or the standard's own."
    )

    def encoding(self) -> "Encoding":
        from spp_fx.exporters.onnx.encodings import SparseInitializers

        return SparseInitializers(self.indices)


@register("onnx-packed")
@dataclass(frozen=True)
class OnnxPacked(OnnxFormat):
    """ONNX, N:M weights packed, unpacked by standard operators."""

    def encoding(self) -> "Encoding":
        from spp_fx.exporters.onnx.encodings import PackedCodes

        return PackedCodes()


@register("onnx-dense")
@dataclass(frozen=True)
class OnnxDense(OnnxFormat):
    """ONNX, dense constants that keep the pattern (TensorRT --sparsity=enable)."""

    def encoding(self) -> "Encoding":
        from spp_fx.exporters.onnx.encodings import DenseConstants

        return DenseConstants()
