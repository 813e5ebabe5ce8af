"""The formats that come with spp-fx; importing this module makes them known."""

from spp_fx.exporters import cusparselt, cutlass, onnx, plain, sparse_bitmask
from spp_fx.exporters.registry import (
    FORMATS,
    Decoded,
    ExportSettings,
    Format,
    Say,
    Tick,
    Weights,
    find_format,
    register,
)
from spp_fx.exporters.source import Source

__all__ = [
    "FORMATS",
    "Decoded",
    "ExportSettings",
    "Format",
    "Say",
    "Source",
    "Tick",
    "Weights",
    "cusparselt",
    "cutlass",
    "find_format",
    "onnx",
    "plain",
    "register",
    "sparse_bitmask",
]
