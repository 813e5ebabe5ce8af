"""canonicalize: find every linear of the graph, however it is written, and give it one form.

| the graph has                                       | kind    | becomes                        |
|-----------------------------------------------------|---------|--------------------------------|
| linear(x, W, b)                                     | linear  | unchanged                      |
| addmm(b, x, W), W stored (in, out)                  | conv1d  | linear(x, t(W), b)             |
| matmul(x, t(W)) or mm(x, t(W))                      | matmul  | linear(x, W)                   |
| matmul(x, W), W stored (in, out)                    | matmul  | linear(x, t(W))                |
| matmul(W, x)                                        | matmul  | t(linear(t(x), W))             |
| a grouped or batched product with a stack of matrices | experts | unchanged: routing is its own |
| a leaf, whose module multiplies by W                | as stored | the leaf reads held(W)       |

The node that contracts a weight is marked with the site's name; the weight's canonical orientation is
known from then on. Every other matrix is named in `program.left_out`.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn

from spp_fx.errors import PostconditionError, PreconditionError
from spp_fx.graph.flow import (
    CASTS,
    KEEPS,
    LOOKUPS,
    MOVES,
    PARTS,
    REDUCTIONS,
    SUMS,
    SWAPS,
    Flow,
    Read,
    Value,
    contractions,
    dimensions_of,
    is_elementwise,
    permutation,
    sizes,
)
from spp_fx.graph.leaves import Leaf, held, run_leaf
from spp_fx.graph.names import in_model
from spp_fx.graph.outline import is_router
from spp_fx.graph.program import ROUTES, SITE, Kind, LeftOut, Program, child_path
from spp_fx.graph.rewrite import call, reach, replace_by_call, replace_operand
from spp_fx.graph.roles import SCALES, role
from spp_fx.passes.base import Pass, PassReport, register

aten = torch.ops.aten

KINDS: dict[object, Kind] = {
    aten.linear.default: "linear",
    aten.addmm.default: "conv1d",
    aten.mm.default: "matmul",
    aten.matmul.default: "matmul",
}
EITHER = (aten.bmm.default, aten.mm.default, aten.matmul.default)
"""Products that take a weight as either operand."""
GATHERS = (aten.index.Tensor, aten.index_select.default)
ROWS = (aten.embedding.default, aten.embedding_bag.default)
PRODUCTS = (*SCALES, aten.addcmul.default)
SUMMING = (*SUMS, aten.linalg_vector_norm.default)
FOLLOWED = (
    *(operator.getitem, aten.clone.default, aten.dropout.default, aten.stack.default),
    *(aten.select.int, aten.unbind.int),
    *(op for op in PARTS if op not in LOOKUPS),
)
"""Ops, beside those that move or cast a value, that contract nothing."""
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
)


@dataclass(frozen=True)
class Contraction:
    """A node that multiplies an activation with a weight, reached from the weight through `chain`."""

    value: Value
    position: int
    transposed: bool
    chain: tuple[fx.Node, ...] = ()
    inside: Kind | None = None
    """The kind of a weight of a leaf, whose product is inside of it."""

    @property
    def node(self) -> fx.Node:
        return self.value.node


@register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Give every linear of the program one form, orientation known.

    Every parameter of two or more dimensions becomes a site, or stands in `program.left_out` with its reason,
    which the report repeats. What a site's result is used for is written into its `role`.
    """

    def requires(self, program: Program) -> None:
        if program.adapters:
            raise PreconditionError("canonicalize: the program has adapters; fold them first")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        flow = Flow(program)
        values = _parameter_values(flow)
        embedded = {name for name, each in values.items() if any(_is_embedded(flow, p) for p in each)}
        found: dict[str, list[Contraction]] = {}
        left_out: dict[str, LeftOut] = {}
        for name, weight in _matrices(program).items():
            if name in program.sites:
                continue
            uses = _uses(flow, values.get(name, []), weight)
            if isinstance(uses, LeftOut):
                left_out[name] = uses
            else:
                found[name] = uses
        # All roles before any rewrite: they follow the graph as it was traced.
        for name, uses in found.items():
            kind, results = _kind(uses[0]), [use.value for use in uses]
            program.sites[name] = site = program.make_site(
                name, kind, transposed=uses[0].transposed, embeddings=embedded, uses=len(uses),
                role=_role_in_leaf(flow, uses[0]) if uses[0].inside
                else None if kind == "experts" else role(flow, results),
            )  # fmt: skip
            report.changed[name] = f"{site.kind} {'x'.join(map(str, site.shape))}"
        changed: set[fx.GraphModule] = set()
        for name, uses in found.items():
            for use in uses:
                if _rewrite(use, name):
                    changed.add(flow.graph(use.value))
        for module in changed:
            module.recompile()
        program.left_out = _with_aliases(program, left_out)
        report.skipped.update((name, why.reason) for name, why in program.left_out.items())
        return report

    def ensures(self, program: Program) -> None:
        unmarked = set(program.sites) - set(program.uses())
        if unmarked:
            raise PostconditionError(f"canonicalize: no node is marked for {', '.join(sorted(unmarked))}")


def _matrices(program: Program) -> dict[str, nn.Parameter]:
    """Every parameter of two or more dimensions under each of its names in the checkpoint."""
    return {
        in_model(path): parameter
        for path, parameter in program.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2
    }


def _parameter_values(flow: Flow) -> dict[str, list[Value]]:
    """The nodes that read each parameter."""
    found: dict[str, list[Value]] = {}
    for value in flow.nodes():
        if value.node.op == "get_attr":
            found.setdefault(in_model(child_path(value.path, value.node)), []).append(value)
    return found


def _is_embedded(flow: Flow, value: Value) -> bool:
    return any(read.node.target in ROWS for read in flow.readers(value))


def _uses(flow: Flow, values: list[Value], weight: nn.Parameter) -> list[Contraction] | LeftOut:
    """The contractions of a weight, or why it is not a site."""
    reads = [read for value in values for read in flow.readers(value) if read.node.target not in ROWS]
    if not reads:
        return _without_reads(flow, values)
    contractions: list[Contraction] = []
    for read in reads:
        reached = _follow(flow, read, weight) if weight.ndim in (2, 3) else None
        if not isinstance(reached, Contraction):
            why = _kernel(flow, values, weight) or _table(flow, values)
            return why or LeftOut(reached or _used_by(flow, read, values), known=False)
        contractions.append(reached)
    link = next((link for c in contractions for link in c.chain if _casts(link, weight)), None)
    if link is not None:
        if role(flow, [c.value for c in contractions]) == ROUTES:
            return LeftOut(f"{ROUTES}, in another dtype than it is stored in", known=True)
        return LeftOut(f"is cast from {weight.dtype} by {link.target} before it is used", known=False)
    if len({(c.transposed, _kind(c)) for c in contractions}) > 1:
        return LeftOut("is used in two orientations or forms", known=False)
    return contractions


def _without_reads(flow: Flow, values: list[Value]) -> LeftOut:
    if values and any(_is_embedded(flow, value) for value in values):
        return LeftOut("is an embedding: its rows are looked up", known=True)
    return LeftOut("is not read when the model is called with tokens", known=False)


def _follow(flow: Flow, read: Read, weight: nn.Parameter) -> Contraction | str | None:
    """From a weight through transposes, casts and gathers to its contraction, or why that cannot be taken.

    None if what uses the weight is none of these ops.
    """
    source, user = read.operand, read.node
    if source.op != "get_attr":
        return f"is used by {user.target} in a module that does not own it"
    if user.target is run_leaf:
        return _follow_into_leaf(flow, read, weight)
    chain: list[fx.Node] = []
    swapped = False
    while (summed := _weight_operands(user, weight.ndim)) is None:
        if user.target in SWAPS:
            if permutation(user, weight.ndim) != [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]:
                return f"passes through {user.target}, which does not transpose its last two dimensions"
            swapped = not swapped
        elif user.target not in (*KEEPS, *CASTS) and not (weight.ndim == 3 and user.target in GATHERS):
            return None
        chain.append(user)
        if len(user.users) != 1:
            return f"the result of {user.target} on it is used {len(user.users)} times"
        source, user = user, next(iter(user.users))
    positions = [i for i, argument in enumerate(user.args) if argument is source]
    if len(positions) != 1 or positions[0] not in summed:
        return f"is an operand of {user.target} where no weight is expected"
    others = [operand for operand in user.all_input_nodes if operand is not source]
    if (
        user.target is not aten.linear.default
        and others
        and all(flow.constant(read.other(o)) for o in others)
    ):
        return f"is multiplied with another parameter by {user.target}"
    if user.target is aten.addmm.default and user.kwargs:
        return "is used by an addmm with factors"
    transposed = (summed[positions[0]] == -1) == swapped
    return Contraction(Value(read.result.path, user), positions[0], transposed, tuple(chain))


def _follow_into_leaf(flow: Flow, read: Read, weight: nn.Parameter) -> Contraction | str:
    leaf, position = _leaf(flow, read.result), read.node.args.index(read.operand)
    if position > len(leaf.names):
        return "is given to code that runs as it is"
    if read.node.args.count(read.operand) > 1:
        return "is used under two names by code that runs as it is"
    transposed = leaf.linears[leaf.names[position - 1]]
    if isinstance(transposed, str):
        return transposed
    kind: Kind = "experts" if weight.ndim == 3 else "conv1d" if transposed else "linear"
    return Contraction(read.result, position, transposed, inside=kind)


def _leaf(flow: Flow, value: Value) -> Leaf:
    """The leaf that a `run_leaf` node runs."""
    found = flow.graph(value).get_submodule(str(cast(fx.Node, value.node.args[0]).target))
    return cast(Leaf, found)


def _role_in_leaf(flow: Flow, contraction: Contraction) -> str | None:
    """Nothing shows what a leaf does with a product: a router is known by its name and the experts beside it."""
    leaf = _leaf(flow, contraction.value)
    owner = leaf.names[contraction.position - 1].rpartition(".")[0]
    return ROUTES if owner and is_router(dict(leaf.module.named_modules()), owner) else None


def _weight_operands(node: fx.Node, ndim: int) -> dict[int, int] | None:
    """Which operands of a contraction may be a weight of so many dimensions, and the dimension that is summed."""
    summed = contractions().get(node.target)
    if summed is None or (node.target in KINDS) != (ndim == 2) or node.target is aten.baddbmm.default:
        return None
    last = max(summed)
    return summed if node.target in EITHER else {last: summed[last]}


def _casts(link: fx.Node, weight: nn.Parameter) -> bool:
    dtypes = [a for a in (*link.args[1:], *link.kwargs.values()) if isinstance(a, torch.dtype)]
    return link.target in CASTS and any(dtype != weight.dtype for dtype in dtypes)


def _results(flow: Flow, values: list[Value]) -> list[Read]:
    """The reads of a parameter, and of what is made of it and other constants alone, by ops that read other values."""

    def onward(value: Value) -> Iterator[Value]:
        return (read.result for read in flow.readers(value) if flow.constant(read.result))

    constants = reach(values, onward)
    return [read for value in constants for read in flow.readers(value) if not flow.constant(read.result)]


def _kernel(flow: Flow, values: list[Value], weight: nn.Parameter) -> LeftOut | None:
    """That a parameter is the kernel of a convolution, if all uses of it show that."""
    reads = _results(flow, values)
    if not reads or any(read.node.target not in CONVOLUTIONS for read in reads):
        return None
    depthwise = "depthwise " if weight.shape[1] == 1 else ""
    return LeftOut(f"is the kernel of a {depthwise}convolution", known=True)


def _table(flow: Flow, values: list[Value]) -> LeftOut | None:
    """Why a parameter is a table and not the weight of a linear, if all uses of it show that."""
    looked_up = False
    for read in _results(flow, values):
        if read.node.target in ROWS:
            looked_up = True
            continue
        is_lookup = read.node.target in LOOKUPS and read.node.args[0] is read.operand
        looked_up |= is_lookup
        ends = list(_moved(flow, read.result)) if is_lookup else [read]
        if not all(is_elementwise(each.node) and not _is_summed(flow, each) for each in ends):
            return None
    what = "its rows are looked up" if looked_up else "it is only added or multiplied elementwise"
    return LeftOut(f"is a table: {what}", known=True)


def _moved(flow: Flow, value: Value) -> Iterator[Read]:
    """The ops that read a value, past those that only move it or cast it."""
    for read in flow.readers(value):
        if read.node.target in MOVES:
            yield from _moved(flow, read.result)
        else:
            yield read


def _is_summed(flow: Flow, read: Read) -> bool:
    """Whether what an op makes of a table is summed along the table's own dimensions, as a linear's product is.

    A product with a value that is broadcast along the table has the form of a linear's: it is followed through all
    elementwise ops, and any op that may contract it counts. Other products, and sums that are broadcast so (a
    distance to each row), are followed through arithmetic with constants: past that, a scaled or shifted
    activation is a feature like any other, which norms and linears do contract. So is an exponential
    of a product, such as the decay of a state space.
    """
    shape = sizes(read.operand) or ()
    own = frozenset(d for d in range(-len(shape), 0) if shape[d] != 1)
    spread = len(own) > 1 and _is_spread(flow, read, own)
    scaled = read.node.target in PRODUCTS
    linear = scaled and spread
    waiting, seen = [(read.result, dimensions_of(read, own))], set[tuple[Value, frozenset[int]]]()
    while waiting:
        value, dims = waiting.pop()
        if (value, dims) in seen:
            continue
        seen.add((value, dims))
        for each in flow.readers(value):
            target = each.node.target
            if each.node.op == "output" or not isinstance(
                each.node.meta.get("val"), torch.Tensor | list | tuple
            ):
                if target in SUMS:  # a graph without shapes
                    return True
                continue
            onward = dimensions_of(each, dims)
            if target in REDUCTIONS:
                if (linear or target in SUMMING) and (not dims or len(onward) < len(dims)):
                    return True
                follow = linear
            elif target is aten.linear.default and each.node.args[1] is each.operand:
                return True
            elif is_elementwise(each.node):
                follow = target is not aten.exp.default and (
                    linear or ((scaled or spread) and _is_alone(flow, each))
                )
            elif target in MOVES:
                follow = True
            elif linear and target not in FOLLOWED:
                return True
            else:
                follow = linear
            if follow and (onward or not dims):
                waiting.append((each.result, onward))
    return False


def _is_spread(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether the other values that an op reads are broadcast along one of `dims` of its operand."""
    shapes = [
        sizes(other) or ()
        for other in read.node.all_input_nodes
        if other is not read.operand and not flow.constant(read.other(other))
    ]
    return bool(shapes) and any(all(len(s) < -d or s[d] == 1 for s in shapes) for d in dims)


def _is_alone(flow: Flow, read: Read) -> bool:
    """Whether an op reads one value and constants."""
    return all(
        other is read.operand or flow.constant(read.other(other)) for other in read.node.all_input_nodes
    )


def _used_by(flow: Flow, first: Read, values: list[Value]) -> str:
    users = list(dict.fromkeys(str(read.node.target) for read in _results(flow, values)))
    if str(first.node.target) in users:
        return f"is used by {', '.join(users)}, which is not a linear"
    return f"reaches {', '.join(users) or 'no op'} through {first.node.target}, which cannot be followed"


def _with_aliases(program: Program, left_out: dict[str, LeftOut]) -> dict[str, LeftOut]:
    """Left out parameters; one that is a site, or is known, under another name has that name as its reason."""
    result: dict[str, LeftOut] = {}
    for name, why in left_out.items():
        others = [
            o for o in program.names_of(name) if o in program.sites or (o in left_out and left_out[o].known)
        ]
        if not why.known and others:
            why = LeftOut(f"is the same tensor as {others[0]}", known=True)
        result[name] = why
    return result


def _kind(contraction: Contraction) -> Kind:
    if contraction.inside is not None:
        return contraction.inside
    kind = KINDS.get(contraction.node.target, "experts")
    return "linear" if kind == "conv1d" and not contraction.transposed else kind


def _rewrite(contraction: Contraction, name: str) -> bool:
    """Mark the node of a contraction, or put aten.linear over the stored parameter in its place; whether it did."""
    node, chain = contraction.node, contraction.chain
    if contraction.inside is not None:
        weight = cast(fx.Node, node.args[contraction.position])
        with node.graph.inserting_before(node):
            handed = call(node.graph, held, weight)
        handed.meta = weight.meta | {SITE: name}
        replace_operand(node, contraction.position, handed)
        return True
    if _kind(contraction) == "experts" or (node.target is aten.linear.default and not chain):
        node.meta[SITE] = name
        return False
    x, bias = node.args[0], None
    if node.target is aten.addmm.default:
        bias, x = node.args[:2]
    elif node.target is aten.linear.default:
        bias = (*node.args, None)[2]
    weight = chain[0].args[0] if chain else node.args[contraction.position]
    if contraction.transposed:
        with node.graph.inserting_before(node):
            weight = call(node.graph, aten.t.default, weight)
    if contraction.position == 0 and node.target in EITHER:
        _swap(node, cast("fx.Node", weight), cast("fx.Node", node.args[1]), name)
    else:
        given = [] if bias is None else [bias]
        replace_by_call(node, aten.linear.default, x, weight, *given, **{SITE: name})
    return True


def _swap(node: fx.Node, weight: fx.Node, x: fx.Node, name: str) -> None:
    """Let the transpose of a linear of the transposed activation stand for a product W x."""
    if x.meta["val"].ndim == 1:
        replace_by_call(node, aten.linear.default, x, weight, **{SITE: name})
        return
    with node.graph.inserting_before(node):
        rows = call(node.graph, aten.transpose.int, x, -1, -2)
        product = call(node.graph, aten.linear.default, rows, weight)
    rows.meta = x.meta | {"val": x.meta["val"].transpose(-1, -2)}
    product.meta = node.meta | {"val": node.meta["val"].transpose(-1, -2), SITE: name}
    replace_by_call(node, aten.transpose.int, product, -1, -2)
