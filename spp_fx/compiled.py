"""Compilers that need not be installed: code that wants one is compiled, or imported, through here."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function compiled by numba, to run without the interpreter's lock; on disk where a cache can be written."""
    from numba import njit

    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True, **options)(function)


@cache
def optional_module(name: str) -> ModuleType | None:
    """A module whose import needs a compiler (numba, llvmlite, triton); None where that is missing."""
    try:
        return import_module(name)
    except ImportError:
        return None
