"""What a graph does with the result of a linear: choose experts by it, scale a branch by it, or carry it on.

A router is known by what happens to its result, not by its name or size: a top-k, a sort or an arg max runs
along the dimension of its outputs before anything contracts that dimension with another weight.
Attention does not do that, nor do indexers that choose keys: there the top-k runs along the tokens, of a
product of two linears' results.
"""

import operator
from collections import deque
from collections.abc import Iterator

import torch
from torch import fx

from spp_fx.graph.flow import (
    INDEX_OF_LARGEST,
    LARGEST,
    MOVES,
    PARTS,
    SORTS,
    Flow,
    Read,
    Value,
    argument,
    contractions,
    dimensions_of,
    is_elementwise,
    sizes,
)
from spp_fx.graph.program import GATES, ROUTES
from spp_fx.graph.rewrite import reach

aten = torch.ops.aten

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
CARRIES = (
    *(*MOVES, aten.clone.default, aten.type_as.default, aten.to.device, aten.to.other, aten.dropout.default),
)
"""Ops whose result stands for their first operand."""


def role(flow: Flow, results: list[Value]) -> str | None:
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


def _routes(flow: Flow, result: Value) -> bool:
    """Whether a choice is made among the outputs of a linear before they are used as features."""
    seen: dict[tuple[Value, bool], frozenset[int]] = {}
    waiting = deque([(result, frozenset({-1}), False)])
    choices: list[Value] = []
    contracted, products = False, contractions()
    while waiting:
        value, dims, chosen = waiting.popleft()
        known = seen.get((value, chosen), frozenset())
        if dims <= known:
            continue
        seen[value, chosen] = dims = dims | known
        for read in flow.readers(value):
            if read.node.op == "output" or read.node.target in MIXES:
                continue
            if read.node.target in products:
                if _contracts(flow, read, dims):
                    if not chosen:
                        return False
                    contracted = True
                continue
            if not isinstance(read.node.meta.get("val"), torch.Tensor | list | tuple):
                continue  # a size
            choice = _chooses(flow, read, dims)
            if choice:
                choices.append(read.result)
            if _is_indices(read):
                continue
            onward = dimensions_of(read, dims)
            if onward:
                waiting.append((read.result, onward, chosen or choice))
    if contracted:  # the largest of many features are kept, unless the choice is used for more than that
        return any(_indexes(flow, choice) for choice in choices)
    return bool(choices)


def _is_indices(read: Read) -> bool:
    """Whether an op takes the indices out of what a sort or a top-k gives: numbers, not features."""
    node = read.node
    if node.target is not operator.getitem or read.operand.target not in (*SORTS, *LARGEST):
        return False
    return bool(node.args[1])


def _contracts(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether a contraction sums along `dims` against a weight."""
    summed = contractions()[read.node.target]
    operands = [read.node.args[position] for position in summed]
    return any(
        operand is read.operand
        and dim in dims
        and isinstance(other, fx.Node)
        and flow.constant(read.other(other))
        for operand, other, dim in zip(operands, reversed(operands), summed.values(), strict=True)
    )


def _chooses(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether an op picks some along `dims` by their values, or by indices that sort the tokens as well."""
    node = read.node
    if node.target in LARGEST and not any(u.args[1] == 1 and u.users for u in node.users):
        return False  # the largest value, whichever it is
    if node.target is aten.gather.default:
        index = argument(node, "index")
        if node.args[0] is not read.operand or not _sorts(flow, read.other(index)):
            return False
    elif node.target not in (*SORTS, *LARGEST, *INDEX_OF_LARGEST):
        return False
    dim = argument(node, "dim")
    return dim is None or (int(dim) if dim < 0 else int(dim) - len(sizes(read.operand) or ())) in dims


def _sorts(flow: Flow, index: Value) -> bool:
    """Whether indices, such as those that a table of experts by token gives, group the tokens or look weights up."""

    def onward(value: Value) -> Iterator[Value]:
        if value.node.target in CARRIES and isinstance(value.node.args[0], fx.Node):
            yield from flow.sources(value.beside(value.node.args[0]))
        yield from (read.result for read in flow.readers(value) if read.node.target in CARRIES)

    return any(
        read.node.target in GROUPS
        or (read.node.target is aten.index.Tensor and read.node.args[0] is not read.operand)
        for value in reach(flow.sources(index), onward)
        for read in flow.readers(value)
    )


def _indexes(flow: Flow, choice: Value) -> bool:
    """Whether the indices of a choice are used for more than to pick or value the chosen values themselves."""
    indices = [choice] if choice.node.target in INDEX_OF_LARGEST else []
    if choice.node.target in (*SORTS, *LARGEST):
        indices = [choice.beside(user) for user in choice.node.users if user.args[1] == 1]

    def moves(read: Read) -> bool:
        return read.node.target in CARRIES or read.node.target is operator.getitem

    def onward(value: Value) -> Iterator[Value]:
        return (read.result for read in flow.readers(value) if moves(read))

    return any(
        not moves(read) and read.node.target not in (*SCATTERS, aten.gather.default)
        for value in reach(indices, onward)
        for read in flow.readers(value)
    )


def _gates(flow: Flow, result: Value) -> bool:
    """Whether every use of a linear's single output ends as a factor that is broadcast over another value."""
    derived, waiting = {result}, [result]
    mixed: list[Read] = []  # reads by ops with an operand that is not made of the output, as far as is known
    while waiting:
        for read in flow.readers(waiting.pop()):
            if not isinstance(read.node.meta.get("val"), torch.Tensor | list | tuple):
                if read.node.op == "output":
                    return False
            elif not is_elementwise(read.node) and read.node.target not in (*CARRIES, *PARTS):
                return False
            else:
                mixed.append(read)
        own = [read for read in mixed if not _others(flow, read, derived)]
        mixed = [read for read in mixed if read not in own]
        fresh = {read.result for read in own} - derived
        derived |= fresh
        waiting += fresh
    return bool(mixed) and all(read.node.target in SCALES and _broadcast(read) for read in mixed)


def _others(flow: Flow, read: Read, derived: set[Value]) -> list[fx.Node]:
    """Operands of an op that are neither constants nor made of a value in `derived`."""
    if read.node.target in CARRIES:
        return []
    own = {(value.path, value.node) for value in derived}
    return [
        operand
        for operand in read.node.all_input_nodes
        if isinstance(operand.meta.get("val"), torch.Tensor)
        and not flow.constant(read.other(operand))
        and not own.issuperset((s.path, s.node) for s in flow.sources(read.other(operand)))
    ]


def _broadcast(read: Read) -> bool:
    """Whether an op repeats its operand to the shape of its result."""
    own, result = sizes(read.operand) or (), sizes(read.node) or ()
    whole = (1,) * (len(result) - len(own)) + own
    return any(size == 1 and total > 1 for size, total in zip(whole, result, strict=True))
