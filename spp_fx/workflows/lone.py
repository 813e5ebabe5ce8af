"""Which tensors of a file without a model around it are weights of linears, as far as names and shapes tell."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spp_fx.sparsity import is_matrix

_PARTS = ("bias", "blocks", "inv", "scale", "scales", "zeros")
"""Last words of what lies beside a stack, or is a part of a quantised one."""


@dataclass(frozen=True)
class ByNames:
    """The tensors of a file by what their names say; vectors are in none of these.

    Attributes:
        sites: matrices and stacks of them that pruning would look at.
        left_out: embeddings and heads, each with that reason.
        unread: every other matrix, with what is known of it.
    """

    sites: tuple[str, ...]
    left_out: dict[str, str]
    unread: dict[str, str]


def by_names(shapes: Mapping[str, tuple[int, ...]]) -> ByNames:
    """Sort stored tensors by their names and shapes."""
    sites: list[str] = []
    left_out: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name, shape in shapes.items():
        if not is_matrix(shape):
            continue
        if (reason := _no_linear(name)) is not None:
            left_out[name] = reason
        elif (reason := _unclear(name, shape)) is not None:
            unread[name] = reason
        else:
            sites.append(name)
    return ByNames(tuple(sites), left_out, unread)


def is_site(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a matrix, or a stack of them, that pruning would look at.

    Stacks of experts are parameters of their own in many models and need not be called a weight.
    """
    return bool(by_names({name: shape}).sites)


def _no_linear(name: str) -> str | None:
    """What a matrix is instead of a linear, if its name says so."""
    modules = name.removesuffix(".weight").split(".")
    if "lm_head" in modules[-2:]:
        return "is the head, by its name"
    if modules[-1] in ("wte", "wpe") or modules[-1].startswith("embed") or modules[-1].endswith("embeddings"):
        return "is an embedding, by its name"
    return None


def _unclear(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a matrix may or may not be a linear's weight."""
    words = _words(name)
    last = name.removesuffix(".weight").rpartition(".")[2]
    if any(word.rstrip("0123456789").endswith("norm") for word in _words(last)):
        return "is a norm, by its name, and a matrix, by its shape"
    if len(shape) == 3 and words[-1] in _PARTS:
        return "is a part of a stack, by its name, and not the weight itself"
    if len(shape) > 2 and any(re.fullmatch(r"conv[123]?d?", word) for word in words):
        return "is the kernel of a convolution, by its name"
    if len(shape) > 3:
        return f"has {len(shape)} dimensions, a mask has two or three"
    if len(shape) == 2 and not name.endswith("weight"):
        return "is not called a weight"
    return None


def _words(name: str) -> list[str]:
    """`layers.0.input_layernorm.weight` -> layers, 0, input, layernorm, weight."""
    return re.split(r"[._]", name)
