"""Where a site's weight lies on disk: which tensors, and which part of the site each one is.

A checkpoint may name a tensor differently from the model (a prefix, the other name of a tied weight),
and stores a stack of experts as one matrix for each. transformers knows these conversions; this reads
them and states, for each site, the tensors that make it up.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from spp_fx.ir.site import Site


@dataclass(frozen=True)
class Piece:
    """One stored matrix of a site.

    Attributes:
        tensor: its name in the checkpoint.
        transposed: it is stored (in, out).
        expert: index of the matrix in a stack, None for a plain matrix.
        start, stop: the rows of the site's matrix that it holds.
        whole: the stored tensor is the whole stack (experts, …), of which this is one matrix.
    """

    tensor: str
    transposed: bool
    expert: int | None
    start: int
    stop: int
    whole: bool = False


@dataclass(frozen=True)
class Binding:
    """Pieces of each site, and why a site has none."""

    pieces: dict[str, tuple[Piece, ...]]
    refused: dict[str, str]


def bind(model: PreTrainedModel, sites: Mapping[str, Site], stored: Mapping[str, tuple[int, ...]]) -> Binding:
    """Find the stored tensors of every site.

    Args:
        model: as built from the configuration; the meta device suffices.
        sites: by name.
        stored: shape of every tensor of the checkpoint, by name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    plain: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            plain[target] = name
        else:
            converted.setdefault(target, {}).setdefault(pattern, []).append(name)
    pieces: dict[str, tuple[Piece, ...]] = {}
    refused: dict[str, str] = {}
    for site in sites.values():
        if site.name in plain:
            found = _plain(site, plain[site.name], stored)
        elif site.name in converted:
            found = _converted(site, converted[site.name], converters, stored)
        else:
            found = "the checkpoint holds no tensor for it"
        if isinstance(found, str):
            refused[site.name] = found
        else:
            pieces[site.name] = found
    return Binding(pieces, refused)


def _plain(site: Site, tensor: str, stored: Mapping[str, tuple[int, ...]]) -> tuple[Piece, ...] | str:
    shape = stored[tensor]
    expected = (*site.shape[:-2], site.shape[-1], site.shape[-2]) if site.transposed else site.shape
    if shape != expected:
        return f"is stored as {tensor} of shape {list(shape)}, the model wants {list(expected)}"
    if len(site.shape) == 2:
        return (Piece(tensor, site.transposed, None, 0, site.out_features),)
    return tuple(
        Piece(tensor, site.transposed, expert, 0, site.out_features, whole=True)
        for expert in range(site.shape[0])
    )


def _converted(
    site: Site,
    by_pattern: Mapping[str, list[str]],
    converters: list[WeightConverter],
    stored: Mapping[str, tuple[int, ...]],
) -> tuple[Piece, ...] | str:
    """Experts merged into a stack (dim 0), their projections side by side along the rows (dim 1)."""
    converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
    operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        names = ", ".join(op.__name__ for op, _ in operations)
        return f"is made of stored tensors by {names}, which cannot be undone matrix by matrix"
    if site.transposed or len(site.shape) != 3:
        return "is made of several stored tensors along its input dimension"
    pieces: list[Piece] = []
    start = [0] * site.shape[0]
    for pattern in (p for p in converter.source_patterns if p in by_pattern):
        number = re.compile(re.escape(pattern.rstrip("$")).replace(r"\*", r"(\d+)"))
        for tensor in by_pattern[pattern]:
            match = number.search(tensor) or re.search(r"\.experts\.(\d+)\.", tensor)
            rows, columns = stored[tensor] if len(stored[tensor]) == 2 else (0, 0)
            if match is None or int(match[1]) >= site.shape[0] or columns != site.in_features:
                return f"its stored tensor {tensor} of shape {list(stored[tensor])} does not fit"
            expert = int(match[1])
            pieces.append(Piece(tensor, False, expert, start[expert], start[expert] + rows))
            start[expert] += rows
    if start != [site.out_features] * site.shape[0]:
        return "its stored tensors do not fill it"
    return tuple(pieces)
