"""What a graph does with the result of a linear: choose experts by it, scale a branch by it, or carry it on.

A router is known by what happens to its result, not by its name or size: a top-k, a sort or an arg max runs
along the dimension of its outputs before anything contracts that dimension with another weight.
Attention does not do that, nor do indexers that choose keys: there the top-k runs along the tokens, of a
product of two linears' results.
"""

import operator
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from spp_fx.graph.program import GATES, ROUTES, Program

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


@dataclass(frozen=True)
class Place:
    """A node of a program.

    Attributes:
        path: of the graph that owns `node`.
        calls: the nodes by whose calls the value came into that graph, the last call last. A graph that is
            called several times gives a value back to the call that it came from.
    """

    path: str
    node: fx.Node
    calls: tuple["Place", ...] = ()


@dataclass(frozen=True)
class Read:
    """An op that reads a value: `node` of the graph at `path`, `operand` the node among its arguments.

    A node with op `output` is the program's own: the value leaves the model.
    """

    path: str
    node: fx.Node
    operand: fx.Node
    calls: tuple[Place, ...] = ()

    @property
    def place(self) -> Place:
        return Place(self.path, self.node, self.calls)

    def of(self, operand: fx.Node) -> Place:
        """Another operand of the same op."""
        return Place(self.path, operand, self.calls)


class Flow:
    """The edges of a program: readers of each value, followed into the graphs that a graph calls and out again."""

    def __init__(self, program: Program) -> None:
        self._graphs = dict(program.graphs())
        self._inputs = {
            path: [node for node in module.graph.nodes if node.op == "placeholder"]
            for path, module in self._graphs.items()
        }
        self._returned = {
            path: next((node.args[0] for node in reversed(module.graph.nodes) if node.op == "output"), None)
            for path, module in self._graphs.items()
        }
        self._calls: dict[str, list[tuple[Place, list[Any]]]] = {}
        self._constant: dict[Place, bool] = {}
        for path, module in self._graphs.items():
            for node in module.graph.nodes:
                called = self._called(path, node)
                if called is not None:
                    child, arguments = called
                    self._calls.setdefault(child, []).append((Place(path, node), arguments))

    def _called(self, path: str, node: fx.Node) -> tuple[str, list[Any]] | None:
        """The graph that a node calls, and what it hands over in the order of the graph's inputs."""
        if node.op == "call_module":
            child = f"{path}.{node.target}".lstrip(".")
            return (child, [*node.args, *node.kwargs.values()]) if child in self._graphs else None
        if node.op == "call_function":  # a higher-order op has the graph among its operands
            for position, operand in enumerate(node.args):
                if isinstance(operand, fx.Node) and operand.op == "get_attr":
                    child = f"{path}.{operand.target}".lstrip(".")
                    if child in self._graphs:
                        return child, list(node.args[position + 1 :])
        return None

    def graph(self, place: Place) -> fx.GraphModule:
        """The graph that owns a node."""
        return self._graphs[place.path]

    def readers(self, place: Place) -> Iterator[Read]:
        """The ops that read a value, in whatever graph."""
        for user in place.node.users:
            called = self._called(place.path, user)
            if called is not None:
                child, arguments = called
                for entry, argument in zip(self._inputs[child], arguments, strict=False):
                    if argument is place.node:
                        yield from self.readers(
                            Place(child, entry, (*place.calls, Place(place.path, user, place.calls)))
                        )
            elif user.op == "output":
                yield from self._readers_outside(place, user)
            else:
                yield Read(place.path, user, place.node, place.calls)

    def _readers_outside(self, place: Place, output: fx.Node) -> Iterator[Read]:
        returned = self._returned[place.path]
        calls = self._callers(place)
        if not calls:
            yield Read(place.path, output, place.node)
        for call, _ in calls:
            if returned is place.node:
                yield from self.readers(call)
                continue
            for user in call.node.users if isinstance(returned, list | tuple) else ():
                if user.target is operator.getitem and returned[int(user.args[1])] is place.node:  # type: ignore[arg-type]
                    yield from self.readers(Place(call.path, user, call.calls))

    def _callers(self, place: Place) -> list[tuple[Place, list[Any]]]:
        """The call by which a value came into its graph, or all calls of the graph if it was made there."""
        calls = self._calls.get(place.path, [])
        if not place.calls:
            return calls
        last = place.calls[-1]
        return [(last, arguments) for call, arguments in calls if call.node is last.node]

    def sources(self, place: Place) -> list[Place]:
        """The ops (or inputs of the program, or attributes) that make a value, in whatever graph."""
        path, node = place.path, place.node
        if node.op == "placeholder":
            position = self._inputs[path].index(node)
            given = [(call, arguments[position]) for call, arguments in self._callers(place)]
            nodes = [Place(c.path, value, c.calls) for c, value in given if isinstance(value, fx.Node)]
            return [source for each in nodes for source in self.sources(each)] or [place]
        call, index = node, None
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            call, index = node.args[0], node.args[1]
        called = self._called(path, call)
        if called is None:
            return [place]
        value = self._returned[called[0]]
        if index is not None and isinstance(value, list | tuple):
            value = value[int(index)]  # type: ignore[arg-type]
        if not isinstance(value, fx.Node):
            return [place]
        return self.sources(Place(called[0], value, (*place.calls, Place(path, call, place.calls))))

    def constant(self, place: Place) -> bool:
        """Whether a value is made of parameters and buffers alone, whatever the program's inputs are."""
        if place not in self._constant:
            self._constant[place] = all(map(self._made_of_constants, self.sources(place)))
        return self._constant[place]

    def _made_of_constants(self, place: Place) -> bool:
        if place.node.op != "call_function":
            return place.node.op == "get_attr"
        operands = place.node.all_input_nodes
        return bool(operands) and all(
            self.constant(Place(place.path, operand, place.calls)) for operand in operands
        )


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

    None if it is not a tensor, or if the graph carries no shapes, which those of `trace` do.
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
        dims: of `read.operand`, counted from the last, -1, as those of the result are. What is counted so holds
            in a graph that is called with values of several shapes, and keeps the shapes of one call.
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
        order = _order(node, len(source))
        return frozenset(i for i, d in enumerate(order) if d in dims)
    if node.target in (aten.select.int, aten.unbind.int):
        gone = int(argument(node, "dim")) % len(source)
        return frozenset(d - (d > gone) for d in dims if d != gone)
    if node.target is aten.stack.default:
        new = int(argument(node, "dim")) % len(result)
        return frozenset(d + (d >= new) for d in dims)
    if node.target in REDUCTIONS:
        gone = _reduced(node, len(source))
        if len(result) == len(source):
            return dims - gone
        kept = [d for d in range(len(source)) if d not in gone]
        return frozenset(i for i, d in enumerate(kept) if d in dims)
    shift = len(result) - len(source)
    if node.target in (*EXPANDS, *PARTS, *SORTS):
        return frozenset(d + shift for d in dims)
    if shift >= 0 and (is_elementwise(node) or (source == result and node.target not in LOOKUPS)):
        return frozenset(d + shift for d in dims if source[d] == result[d + shift])
    return frozenset()


def _order(node: fx.Node, ndim: int) -> list[int]:
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


# Contraction -> position of an operand -> its dimension that is contracted, and the position of the other operand.
CONTRACTED: dict[object, dict[int, tuple[int, int]]] = {
    aten.linear.default: {0: (-1, 1)},
    aten.addmm.default: {1: (-1, 2), 2: (-2, 1)},
    **{op.default: {0: (-1, 1), 1: (-2, 0)} for op in (aten.mm, aten.matmul, aten.bmm, aten._grouped_mm)},
    aten.baddbmm.default: {1: (-1, 2), 2: (-2, 1)},
}
MIXES = (
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.embedding.default,
    aten.index_add.default,
    aten.index_put.default,
    aten.index_put_.default,
)
"""Ops that put elements of one operand where they cannot be followed."""
SCATTERS = (
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.scatter_add.default,
    aten.scatter_add_.default,
)
GROUPS = (*SORTS, aten.histc.default, aten.bincount.default, aten.one_hot.default)
"""Ops that group tokens by the indices of their experts."""
SCALES = (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor)
MOVES = (
    *(*RESHAPES, *SWAPS, *KEEPS, *CASTS, *EXPANDS),
    *(aten.clone.default, aten.type_as.default, aten.to.device, aten.to.other, aten.dropout.default),
)


def role(flow: Flow, results: list[Place]) -> str | None:
    """Why a linear is left as it is, by what happens to its results.

    Args:
        results: the nodes that contract its weight, (..., out) each.

    Returns:
        `ROUTES` if one of them chooses among its outputs, `GATES` if there is one output and all that any of them
        does is to scale another value; None otherwise, and in graphs that carry no shapes.
    """
    shapes = [sizes(result.node) for result in results]
    if any(_routes(flow, result) for result in results):
        return ROUTES
    if all(shape and shape[-1] == 1 for shape in shapes) and all(_gates(flow, result) for result in results):
        return GATES
    return None


def _routes(flow: Flow, result: Place) -> bool:
    """Whether a choice is made among the outputs of a linear before they are used as features."""
    seen: dict[tuple[Place, bool], frozenset[int]] = {}
    waiting = deque([(result, frozenset({-1}), False)])
    choices: list[Place] = []
    contracted = False
    while waiting:
        place, dims, chosen = waiting.popleft()
        known = seen.get((place, chosen), frozenset())
        if dims <= known:
            continue
        seen[place, chosen] = dims = dims | known
        for read in flow.readers(place):
            if read.node.op == "output" or read.node.target in MIXES:
                continue
            if read.node.target in _contractions():
                if _contracts(flow, read, dims):
                    if not chosen:
                        return False
                    contracted = True
                continue
            if not isinstance(read.node.meta.get("val"), torch.Tensor | list | tuple):
                continue  # a size
            choice = _chooses(flow, read, dims)
            if choice:
                choices.append(read.place)
            if _is_indices(read):
                continue
            onward = dimensions_of(read, dims)
            if onward:
                waiting.append((read.place, onward, chosen or choice))
    if contracted:  # the largest of many features are kept, unless the choice is used for more than that
        return any(_indexes(flow, choice) for choice in choices)
    return bool(choices)


def _is_indices(read: Read) -> bool:
    """Whether an op takes the indices out of what a sort or a top-k gives: numbers, not features."""
    node = read.node
    if node.target is not operator.getitem or read.operand.target not in (*SORTS, *LARGEST):
        return False
    return bool(node.args[1])


def _contractions() -> dict[object, dict[int, tuple[int, int]]]:
    """CONTRACTED, with transformers' own grouped product where it is registered."""
    library = getattr(torch.ops, "transformers", None)
    fallback = getattr(library, "grouped_mm_fallback", None)
    return CONTRACTED | ({fallback.default: {0: (-1, 1)}} if fallback is not None else {})


def _contracts(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether a contraction sums along `dims` against a weight."""
    for position, (dim, other) in _contractions()[read.node.target].items():
        if position < len(read.node.args) and read.node.args[position] is read.operand:
            weight = read.node.args[other]
            if isinstance(weight, fx.Node) and flow.constant(read.of(weight)) and dim in dims:
                return True
    return False


def _chooses(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether an op picks some along `dims` by their values, or by indices that sort the tokens as well."""
    node = read.node
    if node.target in LARGEST and not any(u.args[1] == 1 and u.users for u in node.users):
        return False  # the largest value, whichever it is
    if node.target is aten.gather.default:
        index = argument(node, "index")
        if node.args[0] is not read.operand or not _sorts(flow, read.of(index)):
            return False
    elif node.target not in (*SORTS, *LARGEST, *INDEX_OF_LARGEST):
        return False
    dim = argument(node, "dim")
    return dim is None or (int(dim) if dim < 0 else int(dim) - len(sizes(read.operand) or ())) in dims


def _sorts(flow: Flow, index: Place) -> bool:
    """Whether indices, such as a table of experts by token gives, group the tokens or look weights up."""
    waiting, seen = flow.sources(index), set[Place]()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if place.node.target in MOVES and isinstance(place.node.args[0], fx.Node):
            waiting += flow.sources(Place(place.path, place.node.args[0], place.calls))
        for read in flow.readers(place):
            if read.node.target in MOVES:
                waiting.append(read.place)
            elif read.node.target in GROUPS or (
                read.node.target is aten.index.Tensor and read.node.args[0] is not read.operand
            ):
                return True
    return False


def _indexes(flow: Flow, choice: Place) -> bool:
    """Whether the indices of a choice are used for more than to pick or place the chosen values themselves."""
    if choice.node.target in (*SORTS, *LARGEST):
        waiting = [Place(choice.path, u, choice.calls) for u in choice.node.users if u.args[1] == 1]
    else:
        waiting = [choice] if choice.node.target in INDEX_OF_LARGEST else []
    seen: set[Place] = set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        for read in flow.readers(place):
            if read.node.target in MOVES or read.node.target is operator.getitem:
                waiting.append(read.place)
            elif read.node.target not in SCATTERS and read.node.target is not aten.gather.default:
                return True
    return False


def _gates(flow: Flow, result: Place) -> bool:
    """Whether every use of a linear's single output ends as a factor that is broadcast over another value."""
    derived, waiting = {result}, [result]
    mixed: list[Read] = []  # reads by ops with an operand that is not made of the output, as far as is known
    while waiting:
        for read in flow.readers(waiting.pop()):
            if not isinstance(read.node.meta.get("val"), torch.Tensor | list | tuple):
                if read.node.op == "output":
                    return False
            elif not is_elementwise(read.node) and read.node.target not in (*MOVES, *PARTS):
                return False
            else:
                mixed.append(read)
        own = [read for read in mixed if not _others(flow, read, derived)]
        mixed = [read for read in mixed if read not in own]
        fresh = {read.place for read in own} - derived
        derived |= fresh
        waiting += fresh
    return bool(mixed) and all(read.node.target in SCALES and _broadcast(read) for read in mixed)


def _others(flow: Flow, read: Read, derived: set[Place]) -> list[fx.Node]:
    """Operands of an op that are neither constants nor made of a value in `derived`."""
    if read.node.target in MOVES:
        return []
    own = {(place.path, place.node) for place in derived}
    return [
        operand
        for operand in read.node.all_input_nodes
        if isinstance(operand.meta.get("val"), torch.Tensor)
        and not flow.constant(read.of(operand))
        and not own.issuperset((s.path, s.node) for s in flow.sources(read.of(operand)))
    ]


def _broadcast(read: Read) -> bool:
    """Whether an op repeats its operand to the shape of its result."""
    own, result = sizes(read.operand) or (), sizes(read.node) or ()
    whole = (1,) * (len(result) - len(own)) + own
    return any(size == 1 and total > 1 for size, total in zip(whole, result, strict=True))
