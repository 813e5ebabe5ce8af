"""Reordering the inputs of a weight so that an N:M pattern costs less, without changing what the model computes.

Inputs may change places where what makes them can make them in the new order: where they come, through
operations on single entries alone, from linears of the same layer, and nothing else reads what lies between.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from spp_fx.graph.program import SITE, Program, child_path, is_size
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


@dataclass(eq=False)
class Value:
    """A value inside of a layer, whichever of its nested graphs makes it."""

    node: fx.Node
    path: str
    inputs: list["Value"]
    users: list["Value"] = field(default_factory=list)
    leaves: bool = False


@dataclass(frozen=True)
class Producers:
    """What makes the inputs of a site: sites by their rows, and the biases added to them."""

    sites: tuple[str, ...]
    biases: tuple[str, ...]


def producers(program: Program, unit: str) -> dict[str, Producers | str]:
    """For each matrix that a layer uses once, what can take on a new order of its inputs, or why nothing can."""
    values = _Inliner(program, unit).values
    sites = {value.node.meta[SITE]: value for value in values if SITE in value.node.meta}
    return {name: _producers(program, name, value, values) for name, value in sites.items()}


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


def _producers(program: Program, name: str, value: Value, values: list[Value]) -> Producers | str:
    site = program.sites[name]
    if site.kind == "experts":
        return "is a stack of experts"
    if site.uses != 1:
        return f"is used {site.uses} times"
    region: dict[Value, None] = {}
    waiting = [value.inputs[0]]
    found: list[Value] = []
    reasons: list[str] = []
    while waiting:
        each = waiting.pop()
        if each in region:
            continue
        region[each] = None
        if (reason := _odd(program, each, site.in_features)) is not None:
            reasons.append(reason)
        if SITE in each.node.meta:
            found.append(each)
        elif _is_pointwise(each.node):
            waiting.extend(v for v in each.inputs if not is_size(v.node))
    if reasons:
        return RESIDUAL if RESIDUAL in reasons else reasons[0]
    for each in region:
        others = [user for user in each.users if user not in region and user is not value]
        if others or each.leaves:
            reader = others[0].node.name if others else "what follows the layer"
            return (
                f"{reader} reads its input too"
                if each is value.inputs[0]
                else f"{reader} reads {each.node.name} too"
            )
    biases = [bias for each in found for bias in each.inputs[2:]]
    readers = [_parameter(each) for each in values]
    if any(len(bias.users) != 1 or readers.count(_parameter(bias)) != 1 for bias in biases):
        return "a bias before it is not a parameter of its own"
    return Producers(
        tuple(sorted(each.node.meta[SITE] for each in found)),
        tuple(sorted(str(_parameter(bias)) for bias in biases)),
    )


def _parameter(value: Value) -> str | None:
    """The name of the parameter that a value is."""
    return child_path(value.path, value.node) if value.node.op == "get_attr" else None


def _odd(program: Program, value: Value, columns: int) -> str | None:
    """Why a value between producers and a site cannot be reordered."""
    node = value.node
    if SITE in node.meta:
        site = program.sites[node.meta[SITE]]
        if (
            site.kind == "experts"
            or site.uses != 1
            or site.tied_to is not None
            or site.out_features != columns
        ):
            return f"its input comes from {site.name}, whose rows cannot be reordered"
        return None
    if node.op == "placeholder":
        return RESIDUAL
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


class _Inliner:
    """The values of a layer with its nested graphs taken apart."""

    def __init__(self, program: Program, unit: str) -> None:
        self.values: list[Value] = []
        module = program.get_submodule(unit)
        assert isinstance(module, fx.GraphModule)
        entering = [self._new(node, unit, {}) for node in module.graph.find_nodes(op="placeholder")]
        for value in _flat(self._inline(unit, module, entering)):
            value.leaves = True

    def _inline(self, path: str, module: fx.GraphModule, arguments: Sequence[Any]) -> Any:
        env: dict[fx.Node, Any] = {}
        given = iter(arguments)
        for node in module.graph.nodes:
            child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                return map_arg(node.args[0], env.__getitem__)
            elif isinstance(child, fx.GraphModule):
                given_to_child = map_arg((*node.args, *node.kwargs.values()), env.__getitem__)
                env[node] = self._inline(f"{path}.{node.target}", child, given_to_child)
            elif node.target is operator.getitem and isinstance(env[node.args[0]], list | tuple):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._new(node, path, env)
        return None

    def _new(self, node: fx.Node, path: str, env: dict[fx.Node, Any]) -> Value:
        value = Value(node, path, [each for n in node.all_input_nodes for each in _flat(env[n])])
        for each in value.inputs:
            each.users.append(value)
        self.values.append(value)
        return value


def _flat(values: Any) -> Iterator[Value]:
    if isinstance(values, Value):
        yield values
    elif isinstance(values, list | tuple):
        for each in values:
            yield from _flat(each)
