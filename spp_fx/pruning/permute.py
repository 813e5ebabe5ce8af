"""Reordering the inputs of a weight so that an N:M pattern costs less, without changing what the model computes.

Inputs may change places where what makes them can make them in the new order: where they come, through
operations on single entries alone, from linears of the same layer, and nothing else reads what lies between.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from spp_fx.graph.flow import Flow, Value
from spp_fx.graph.leaves import held
from spp_fx.graph.program import SITE, child_path, is_size
from spp_fx.sparsity.pattern import NM

aten = torch.ops.aten

POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        "silu", "gelu", "relu", "sigmoid", "tanh", "elu", "leaky_relu", "softplus", "hardswish", "mish", "neg", "exp",
        "square", "sqrt", "rsqrt", "abs", "pow", "mul", "add", "sub", "div", "clamp", "minimum",
        "maximum", "dropout", "to", "_to_copy", "contiguous", "clone", "alias", "detach",
    )
)  # fmt: skip
"""Elementwise operations."""
RESHAPES = frozenset((aten.view, aten.reshape, aten._unsafe_view))
"""Operations that keep every row where they keep the last dimension."""

RESIDUAL = "its input is the residual stream, which other layers read too"


@dataclass(frozen=True)
class Producers:
    """What makes the inputs of a site: sites by their rows, and the biases added to them."""

    sites: tuple[str, ...]
    biases: tuple[str, ...]


def producers(flow: Flow, unit: str) -> dict[str, Producers | str]:
    """For each matrix that a layer uses once, what can take on a new order of its inputs, or why nothing can."""
    layer = _Layer(flow, unit)
    return {value.node.meta[SITE]: layer.producers(value) for value in layer.nodes if SITE in value.node.meta}


def best_order(score: Tensor, pattern: NM) -> Tensor | None:
    """An order of the columns that spreads those of large score over the groups; None if that keeps no more.

    Columns sorted by their summed score are dealt to the groups in snake order: to the first up to the
    last, then back (Zhang et al., 2024, Section 3.2).

    Args:
        score: (out, in), of every entry.

    Returns:
        (in,) int64: which column takes each place.
    """
    columns = score.shape[1]
    groups = columns // pattern.group
    ranked = score.sum(0).argsort(descending=True, stable=True).view(pattern.group, groups)
    ranked[1::2] = ranked[1::2].flip(1)
    order = ranked.t().flatten()
    return order if _kept(score[:, order], pattern) > _kept(score, pattern) else None


def _kept(score: Tensor, pattern: NM) -> float:
    groups = score.view(-1, pattern.group)
    return float(groups.topk(pattern.kept, dim=1).values.sum(dtype=torch.float64))


class _Layer:
    """A layer of a program, with the graphs nested in it."""

    def __init__(self, flow: Flow, unit: str) -> None:
        self.flow, self.unit, self.sites = flow, unit, flow.program.sites
        self.nodes = [value for value in flow.nodes() if self._holds(value)]
        self.reads = Counter(
            child_path(value.path, value.node) for value in self.nodes if value.node.op == "get_attr"
        )

    def _holds(self, value: Value) -> bool:
        return f"{value.path}.".startswith(f"{self.unit}.")

    def producers(self, use: Value) -> Producers | str:
        site = self.sites[use.node.meta[SITE]]
        if site.kind == "experts":
            return "is a stack of experts"
        if use.node.target is held:
            return "is used by code that runs as it is"
        if site.uses != 1:
            return f"is used {site.uses} times"
        ends = self.flow.sources(use.beside(use.node.all_input_nodes[0]))
        region: dict[fx.Node, Value] = {}
        makers: list[Value] = []
        reasons: list[str] = []
        waiting = list(ends)
        while waiting:
            value = waiting.pop()
            if value.node in region:
                continue
            region[value.node] = value
            if (reason := self._obstacle(value, site.in_features)) is not None:
                reasons.append(reason)
            if SITE in value.node.meta:
                makers.append(value)
            elif _is_pointwise(value.node) and self._holds(value):
                operands = [n for n in value.node.all_input_nodes if not is_size(n)]
                waiting += [source for n in operands for source in self.flow.sources(value.beside(n))]
        if reasons:
            return RESIDUAL if RESIDUAL in reasons else reasons[0]
        for value in region.values():
            for read in self.flow.readers(value):
                if read.node not in region and read.node is not use.node:
                    reader = read.node.name if self._holds(read.result) else "what follows the layer"
                    return f"{reader} reads {'its input' if value in ends else value.node.name} too"
        operands = [maker.beside(n) for maker in makers for n in maker.node.all_input_nodes[2:]]
        added = [source for each in operands for source in self.flow.sources(each)]
        biases = [name for each in added if (name := self._own_parameter(each)) is not None]
        if len(biases) < len(added):
            return "a bias before it is not a parameter of its own"
        return Producers(tuple(sorted(each.node.meta[SITE] for each in makers)), tuple(sorted(biases)))

    def _own_parameter(self, value: Value) -> str | None:
        """The name of the parameter that a value is, if the layer reads that once."""
        name = child_path(value.path, value.node)
        once = self.reads[name] == 1 and len(value.node.users) == 1
        return name if value.node.op == "get_attr" and once else None

    def _obstacle(self, value: Value, columns: int) -> str | None:
        """Why a value between producers and a site cannot be reordered."""
        node = value.node
        if not self._holds(value):
            return RESIDUAL
        if SITE in node.meta:
            site = self.sites[node.meta[SITE]]
            plain = site.kind != "experts" and site.uses == 1 and site.tied_to is None
            if not plain or site.out_features != columns:
                return f"its input comes from {site.name}, whose rows cannot be reordered"
            return None
        if not _is_pointwise(node):
            return f"its input comes through {node.target}, which does not treat each entry alone"
        known = node.meta.get("val")
        if isinstance(known, Tensor) and known.shape[-1:] != (columns,):
            return f"its input comes through {node.name} of another shape"
        return None


def _is_pointwise(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in POINTWISE or (
        packet in RESHAPES and _columns(node) == _columns(node.args[0]) is not None
    )


def _columns(node: Any) -> int | None:
    """The size of the last dimension of a node's value, where it is fixed."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.shape[-1] if isinstance(value, Tensor) else None
