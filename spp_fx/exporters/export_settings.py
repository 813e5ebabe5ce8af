"""Options of the export formats; importing them brings no format, and no torch."""

from dataclasses import dataclass
from typing import Literal

from spp_fx.options import option


@dataclass(frozen=True)
class ExportSettings:
    """Options of the formats; each format names those it takes."""

    sm: int = option(
        80, "GPU that weights are packed for: 80 Ampere, 90 Hopper; others are packed when they are loaded."
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(None, "Round the weights to this type.")
    indices: Literal["smallest", "int64"] = option(
        "smallest", "Index type of onnx: the smallest onnxruntime takes, or the standard's own."
    )
    with_past: bool = option(False, "ONNX graph with a key/value cache, under Optimum's names.")
    compare_logits: bool | None = option(
        None,
        "Run the written graph and compare its logits with the model's. Default: models below 1 GB.",
    )
