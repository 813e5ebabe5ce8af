"""Which stored matrices should be sparse, and the answer that tensor names alone can give."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TypeVar

from spp_fx.sparsity.scan import is_matrix

Value = TypeVar("Value")

_COMPANIONS = ("bias", "blocks", "inv", "scale", "scales", "zeros")
"""Last words of tensors that lie beside a stack of experts, or are one part of a quantized stack."""


@dataclass(frozen=True)
class Sites:
    """The matrices of an artifact that should be sparse, and a reason for each other matrix.

    Attributes:
        transposed: stored name of each site -> whether it is stored (in, out). A site of which nothing is
            stored is here under its own name.
        unreadable: sites that are stored in a form whose zeros cannot be read, and why.
        left_out: matrices that are not sites because of what the model does with them (embeddings, the head,
            routers).
        unread: every other matrix, with what is known of it.
    """

    transposed: Mapping[str, bool]
    unreadable: Mapping[str, str]
    left_out: Mapping[str, str]
    unread: Mapping[str, str]

    def within(self, names: Container[str]) -> "Sites":
        """What is said of some matrices."""

        def those(table: Mapping[str, Value]) -> dict[str, Value]:
            return {name: value for name, value in table.items() if name in names}

        return Sites(those(self.transposed), those(self.unreadable), those(self.left_out), those(self.unread))

    def with_sites(self, transposed: Mapping[str, bool]) -> "Sites":
        """With more sites, which are then neither left out nor unread."""

        def others(table: Mapping[str, str]) -> dict[str, str]:
            return {name: reason for name, reason in table.items() if name not in sites}

        sites = {**self.transposed, **transposed}
        return Sites(sites, self.unreadable, others(self.left_out), others(self.unread))


def sites_by_name(shapes: Mapping[str, tuple[int, ...]]) -> Sites:
    """Sort stored tensors by their names and shapes; vectors are in none of the tables."""
    sites: dict[str, bool] = {}
    left_out: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name, shape in shapes.items():
        if not is_matrix(shape):
            continue
        if (reason := _other_role(name)) is not None:
            left_out[name] = reason
        elif (reason := _unclear(name, shape)) is not None:
            unread[name] = reason
        else:
            sites[name] = False
    return Sites(sites, {}, left_out, unread)


def is_site(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a matrix that pruning would take, or a stack of such matrices.

    In many models a stack of experts is a parameter of its own, whose name does not end in 'weight'.
    """
    return name in sites_by_name({name: shape}).transposed


def _other_role(name: str) -> str | None:
    """What a matrix is instead of a linear, if its name says so."""
    modules = name.removesuffix(".weight").split(".")
    if "lm_head" in modules[-2:]:
        return "is the head, by its name"
    if modules[-1] in ("wte", "wpe") or modules[-1].startswith("embed") or modules[-1].endswith("embeddings"):
        return "is an embedding, by its name"
    return None


def _unclear(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a matrix may or may not be the weight of a linear."""
    words = _words(name)
    last = name.removesuffix(".weight").rpartition(".")[2]
    if any(word.rstrip("0123456789").endswith("norm") for word in _words(last)):
        return "is a norm, by its name, and a matrix, by its shape"
    if len(shape) == 3 and words[-1] in _COMPANIONS:
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
