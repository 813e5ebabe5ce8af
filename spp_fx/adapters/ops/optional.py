"""Kernels whose compiler need not be installed."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def optional(name: str) -> ModuleType | None:
    """A module of this folder, or None where what it imports is missing."""
    try:
        return import_module(f"spp_fx.adapters.ops.{name}")
    except ImportError:
        return None
