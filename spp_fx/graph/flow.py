"""How values flow through a program: what reads and what makes each, and which dimensions an op carries on."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from spp_fx.graph.program import Program, child_path

aten = torch.ops.aten

RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
"""Ops that give the same elements in the same order another shape."""
SWAPS = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
"""Ops that permute dimensions."""
KEEPS = (aten.contiguous.default, aten.alias.default, aten.detach.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
EXPANDS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default)
"""Ops that add dimensions in front and repeat along dimensions."""
PARTS = (
    *(aten.slice.Tensor, aten.narrow.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default),
    *(aten.split_with_sizes.default, aten.tensor_split.sections, aten.cat.default, aten.concat.default),
    *(aten.constant_pad_nd.default, aten.pad.default, aten.repeat_interleave.self_int, aten.gather.default),
)
"""Ops that change the sizes of dimensions and leave their order."""
SORTS = (
    *(aten.topk.default, aten.sort.default, aten.sort.stable),
    *(aten.argsort.default, aten.argsort.stable),
)
LARGEST = (aten.max.dim, aten.min.dim, aten.kthvalue.default)
INDEX_OF_LARGEST = (aten.argmax.default, aten.argmin.default)
SUMS = (aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
REDUCTIONS = (
    *(*SUMS, *LARGEST, *INDEX_OF_LARGEST, aten.amax.default, aten.amin.default, aten.logsumexp.default),
    *(aten.any.dim, aten.all.dim, aten.prod.dim_int, aten.linalg_vector_norm.default),
)
LOOKUPS = (aten.index.Tensor, aten.index_select.default, aten.gather.default)
MOVES = (*RESHAPES, *SWAPS, *KEEPS, *CASTS, *EXPANDS)
"""Ops that compute nothing."""


def contractions() -> dict[object, dict[int, int]]:
    """The matrix products: op -> position of each of its two operands -> the dimension of it that is summed."""
    products = (aten.mm, aten.matmul, aten.bmm, aten._grouped_mm)
    # transformers registers a grouped product of its own when its experts are first used.
    fallback = getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None)
    return {
        aten.linear.default: {0: -1, 1: -1},
        aten.addmm.default: {1: -1, 2: -2},
        aten.baddbmm.default: {1: -1, 2: -2},
        **{op.default: {0: -1, 1: -2} for op in (*products, fallback) if op is not None},
    }


@dataclass(frozen=True)
class Value:
    """What a node of a program computes.

    Attributes:
        path: of the graph that owns `node`.
        calls: the nodes by whose calls the value came into that graph, the last call last. A graph that is
            called several times gives a value back to the call that it came from.
    """

    path: str
    node: fx.Node
    calls: tuple["Value", ...] = ()

    def beside(self, node: fx.Node) -> "Value":
        """The value of another node of the same graph, in the same call of it."""
        return Value(self.path, node, self.calls)


@dataclass(frozen=True)
class Read:
    """An op that reads a value, which is the node `operand` among its arguments; `result` is what it makes of it.

    A node with op `output` is the program's own: the value leaves the model.
    """

    result: Value
    operand: fx.Node

    @property
    def node(self) -> fx.Node:
        return self.result.node

    def other(self, operand: fx.Node) -> Value:
        """Another operand of the same op."""
        return self.result.beside(operand)


class Flow:
    """The edges of a program: readers of each value, followed into the graphs that a graph calls and out again."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._graphs = dict(program.graphs())
        self._inputs = {
            path: module.graph.find_nodes(op="placeholder") for path, module in self._graphs.items()
        }
        self._returned = {
            path: node.args[0]
            for path, module in self._graphs.items()
            for node in module.graph.find_nodes(op="output")
        }
        self._calls: dict[str, list[tuple[Value, list[Any]]]] = {}
        self._constant: dict[Value, bool] = {}
        for value in self.nodes():
            called = self._called(value.path, value.node)
            if called is not None:
                child, arguments = called
                self._calls.setdefault(child, []).append((value, arguments))

    def _called(self, path: str, node: fx.Node) -> tuple[str, list[Any]] | None:
        """The graph that a node calls, and the arguments in the order of the graph's inputs."""
        if node.op == "call_module":
            child = child_path(path, node)
            return (child, [*node.args, *node.kwargs.values()]) if child in self._graphs else None
        if node.op == "call_function":  # a higher-order op has the graph among its operands
            for position, operand in enumerate(node.args):
                if isinstance(operand, fx.Node) and operand.op == "get_attr":
                    child = child_path(path, operand)
                    if child in self._graphs:
                        return child, list(node.args[position + 1 :])
        return None

    def nodes(self) -> Iterator[Value]:
        """All nodes of the program."""
        for path, module in self._graphs.items():
            for node in module.graph.nodes:
                yield Value(path, node)

    def graph(self, value: Value) -> fx.GraphModule:
        """The graph that owns a node."""
        return self._graphs[value.path]

    def readers(self, value: Value) -> Iterator[Read]:
        """The ops that read a value, in any graph."""
        for user in value.node.users:
            called = self._called(value.path, user)
            if called is not None:
                child, arguments = called
                for entry, argument in zip(self._inputs[child], arguments, strict=False):
                    if argument is value.node:
                        yield from self.readers(Value(child, entry, (*value.calls, value.beside(user))))
            elif user.op == "output":
                yield from self._readers_outside(value, user)
            else:
                yield Read(value.beside(user), value.node)

    def _readers_outside(self, value: Value, output: fx.Node) -> Iterator[Read]:
        returned: Any = self._returned.get(value.path)
        calls = self._callers(value)
        if not calls:
            yield Read(Value(value.path, output), value.node)
        for call, _ in calls:
            if returned is value.node:
                yield from self.readers(call)
                continue
            for user in call.node.users if isinstance(returned, list | tuple) else ():
                if user.target is operator.getitem and returned[_index(user)] is value.node:
                    yield from self.readers(call.beside(user))

    def _callers(self, value: Value) -> list[tuple[Value, list[Any]]]:
        """The call by which a value came into its graph, or all calls of the graph if it was made there."""
        calls = self._calls.get(value.path, [])
        if not value.calls:
            return calls
        last = value.calls[-1]
        return [(last, arguments) for call, arguments in calls if call.node is last.node]

    def sources(self, value: Value) -> list[Value]:
        """The ops (or inputs of the program, or attributes) that make a value, in any graph."""
        node = value.node
        if node.op == "placeholder":
            position = self._inputs[value.path].index(node)
            given = [(call, arguments[position]) for call, arguments in self._callers(value)]
            nodes = [call.beside(argument) for call, argument in given if isinstance(argument, fx.Node)]
            return [source for each in nodes for source in self.sources(each)] or [value]
        is_item = node.target is operator.getitem and isinstance(node.args[0], fx.Node)
        call = node.all_input_nodes[0] if is_item else node
        called = self._called(value.path, call)
        if called is None:
            return [value]
        returned: Any = self._returned.get(called[0])
        if is_item and isinstance(returned, list | tuple):
            returned = returned[_index(node)]
        if not isinstance(returned, fx.Node):
            return [value]
        return self.sources(Value(called[0], returned, (*value.calls, value.beside(call))))

    def constant(self, value: Value) -> bool:
        """Whether a value is made of parameters and buffers alone, whatever the program's inputs are."""
        if value not in self._constant:
            self._constant[value] = all(map(self._made_of_constants, self.sources(value)))
        return self._constant[value]

    def _made_of_constants(self, value: Value) -> bool:
        if value.node.op != "call_function":
            return value.node.op == "get_attr"
        operands = value.node.all_input_nodes
        return bool(operands) and all(self.constant(value.beside(operand)) for operand in operands)


def _index(item: fx.Node) -> int:
    """Which of several results a getitem takes."""
    return int(cast(int, item.args[1]))


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an op by its name in the op's schema, its default included; None if it has no such name."""
    if not isinstance(node.target, OpOverload):
        return None
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            given = node.args[position] if position < len(node.args) else parameter.default_value
            return node.kwargs.get(name, given)
    return None


def is_elementwise(node: fx.Node) -> bool:
    """Whether an op computes each element of its result of one element of each operand (broadcast)."""
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def sizes(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's result, for several of the first; sizes that are not fixed are large stand-ins.

    None if it is not a tensor, or if the graph carries no shapes, unlike those of `trace`.
    """
    value: Any = node.meta.get("val")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(map(_size, value.shape)) if isinstance(value, Tensor) else None


def _size(size: Any) -> int:
    """A size as a number: equal expressions give equal numbers, products their product."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({s: 1009 + 2 * (sum(map(ord, str(s))) % 97) for s in expression.free_symbols}))


def dimensions_of(read: Read, dims: frozenset[int]) -> frozenset[int]:
    """The dimensions of an op's result along which some dimensions of its operand lie; none if it loses them.

    Args:
        read: an op that does not contract (see `is_elementwise` and the lists above).
        dims: of `read.operand`, counted from the last, -1, as those of the result are: a graph that is called with
            values of several ranks has the shapes of one call.
    """
    source, result = sizes(read.operand), sizes(read.node)
    if read.node.target is operator.getitem:
        return dims
    if source is None or result is None:
        return frozenset()
    inside = frozenset(d + len(source) for d in dims if d >= -len(source))
    return frozenset(d - len(result) for d in _carried(read.node, source, inside, result))


def _carried(
    node: fx.Node, source: tuple[int, ...], dims: frozenset[int], result: tuple[int, ...]
) -> frozenset[int]:
    """As `dimensions_of`, dimensions counted from the first, 0."""
    if node.target in RESHAPES:
        return _reshaped(source, dims, result)
    if node.target in SWAPS:
        return frozenset(i for i, d in enumerate(permutation(node, len(source))) if d in dims)
    if node.target in (aten.select.int, aten.unbind.int):
        dropped = int(argument(node, "dim")) % len(source)
        return frozenset(d - (d > dropped) for d in dims if d != dropped)
    if node.target is aten.stack.default:
        new = int(argument(node, "dim")) % len(result)
        return frozenset(d + (d >= new) for d in dims)
    if node.target in REDUCTIONS:
        reduced = _reduced(node, len(source))
        if len(result) == len(source):
            return dims - reduced
        kept = [d for d in range(len(source)) if d not in reduced]
        return frozenset(i for i, d in enumerate(kept) if d in dims)
    shift = len(result) - len(source)
    if node.target in (*EXPANDS, *PARTS, *SORTS):
        return frozenset(d + shift for d in dims)
    if shift >= 0 and (is_elementwise(node) or (source == result and node.target not in LOOKUPS)):
        return frozenset(d + shift for d in dims if source[d] == result[d + shift])
    return frozenset()


def permutation(node: fx.Node, ndim: int) -> list[int]:
    """Which dimension of its operand each dimension of the result of one of `SWAPS` is."""
    order = list(range(ndim))
    if node.target is aten.permute.default:
        return [int(d) % ndim for d in argument(node, "dims")]
    if node.target is aten.transpose.int:
        first, second = int(argument(node, "dim0")) % ndim, int(argument(node, "dim1")) % ndim
        order[first], order[second] = second, first
        return order
    return order[::-1]


def _reduced(node: fx.Node, ndim: int) -> frozenset[int]:
    dim = argument(node, "dim")
    if dim is None or dim == []:
        return frozenset(range(ndim))
    return frozenset(int(d) % ndim for d in (dim if isinstance(dim, list | tuple) else [dim]))


def _reshaped(source: tuple[int, ...], dims: frozenset[int], result: tuple[int, ...]) -> frozenset[int]:
    """A dimension of the result carries one of the source if their ranges of strides overlap."""
    spans = [_span(source, d) for d in dims]
    return frozenset(
        i
        for i in range(len(result))
        for start, stop in (_span(result, i),)
        if any(max(start, first) < min(stop, last) for first, last in spans)
    )


def _span(shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    stride = prod(shape[dim + 1 :])
    return stride, stride * shape[dim]
