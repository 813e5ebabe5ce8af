"""Exporters: one format a file, each a writer and a reader."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spp_fx.exporters.format import (
        FORMATS,
        Decoded,
        ExportSettings,
        Format,
        Say,
        Source,
        Tick,
        Weights,
        find_format,
        register,
    )

__all__ = [
    "FORMATS",
    "Decoded",
    "ExportSettings",
    "Format",
    "Say",
    "Source",
    "Tick",
    "Weights",
    "find_format",
    "register",
]


def __getattr__(name: str) -> Any:
    """Formats bring torch and onnx, which reading a manifest need not wait for: imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("spp_fx.exporters.builtin")
    return getattr(import_module("spp_fx.exporters.format"), name)
