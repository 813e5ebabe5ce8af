"""The weights of an artifact, which of them are sites, and sites by name: targets, and roles that names suggest."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TypeVar

from spp_fx.sparsity.scan import Scan

Value = TypeVar("Value")

_COMPANIONS = ("bias", "blocks", "inv", "scale", "scales", "zeros")
"""Last words of tensors that lie beside a stack of experts, or are one part of a quantized stack."""


@dataclass(frozen=True)
class Sites:
    """The matrices of an artifact that should be sparse, and a reason for each other matrix.

    Attributes:
        transposed: stored name of each site -> whether it is stored (in, out). A site of which nothing is
            stored is here under its own name.
        unreadable: sites that are stored in a form whose zeros cannot be read, each with the reason.
        left_out: matrices that are not sites because of what the model does with them (embeddings, the head,
            routers), each with that reason.
        unread: every other matrix, with what is known of it.
    """

    transposed: Mapping[str, bool]
    unreadable: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    unread: Mapping[str, str] = field(default_factory=dict[str, str])

    def within(self, names: Container[str]) -> "Sites":
        """Only these matrices."""
        tables = (self.unreadable, self.left_out, self.unread)
        return Sites(within(self.transposed, names), *(within(table, names) for table in tables))

    def with_sites(self, transposed: Mapping[str, bool]) -> "Sites":
        """With more sites, which are then neither left out nor unread."""
        sites = {**self.transposed, **transposed}
        return Sites(sites, self.unreadable, without(self.left_out, sites), without(self.unread, sites))


def within(table: Mapping[str, Value], names: Container[str]) -> dict[str, Value]:
    return {name: value for name, value in table.items() if name in names}


def without(table: Mapping[str, Value], names: Container[str]) -> dict[str, Value]:
    return {name: value for name, value in table.items() if name not in names}


@dataclass(frozen=True)
class Weights:
    """The weights of an artifact, to be scanned one by one.

    Attributes:
        names: its weights.
        scan: scans a weight, given its name and whether it is stored (in, out).
        file: the name of the file that holds a weight.
        find_sites: which weights should be sparse where there is no lock; it may trace the model.
        shape: of a weight, without a scan; None where that is not known, and every weight is a matrix.
        guessed: the sites go by names alone, so that how they are stored is not known.
    """

    names: frozenset[str]
    scan: Callable[[str, bool], Scan]
    file: Callable[[str], str]
    find_sites: Callable[[], Sites]
    shape: Callable[[str], tuple[int, ...]] | None = None
    guessed: bool = False

    @cached_property
    def sites(self) -> Sites:
        return self.find_sites()


def is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def module_name(site: str) -> str:
    """The name of the module that holds a site's weight; a stack has the name of its parameter."""
    return site.removesuffix(".weight")


def is_target(site: str, target: str) -> bool:
    """Whether a target names a site: by its last words, or as a glob over the whole name."""
    name = module_name(site)
    if is_glob(target):
        return fnmatchcase(name, target) or fnmatchcase(site, target)
    return name == target or site == target or name.endswith("." + target)


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor is at least a matrix, and not a vector with dimensions of 1 around it."""
    return sum(size > 1 for size in shape) > 1


def sites_by_name(shapes: Mapping[str, tuple[int, ...]]) -> Sites:
    """Sort stored tensors by their names and shapes; vectors are in none of the tables.

    In many models a stack of experts is a parameter of its own, whose name does not end in 'weight'.
    """
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


def _other_role(name: str) -> str | None:
    """What a matrix is instead of a linear, by its name."""
    modules = name.removesuffix(".weight").split(".")
    if "lm_head" in modules[-2:]:
        return "is the head, by its name"
    if modules[-1] in ("wte", "wpe") or modules[-1].startswith("embed") or modules[-1].endswith("embeddings"):
        return "is an embedding, by its name"
    return None


def _unclear(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a matrix may or may not be the weight of a linear."""
    words = re.split(r"[._]", name)  # layers.0.input_layernorm.weight -> layers, 0, input, layernorm, weight
    last = name.removesuffix(".weight").rpartition(".")[2]
    if any(word.rstrip("0123456789").endswith("norm") for word in last.split("_")):
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
