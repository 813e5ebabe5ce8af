"""canonicalize: find every linear in whatever form the graph wrote it, and give it one form.

| the graph has                                       | kind    | becomes                        |
|-----------------------------------------------------|---------|--------------------------------|
| linear(x, W, b)                                     | linear  | unchanged                      |
| addmm(b, x, W), W stored (in, out)                  | conv1d  | linear(x, t(W), b)             |
| matmul(x, t(W)) or mm(x, t(W))                      | matmul  | linear(x, W)                   |
| matmul(x, W), W stored (in, out)                    | matmul  | linear(x, t(W))                |
| a grouped or batched product with a stack of matrices | experts | unchanged: routing is its own |

The node that contracts a weight is marked with the site's name; the weight's canonical orientation is
known from then on. Whatever else holds a matrix is named in `program.left_out`.
"""

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from spp_fx.errors import PostconditionError, PreconditionError
from spp_fx.graph.names import layer_of
from spp_fx.graph.program import ROUTES, SITE, Kind, LeftOut, Program, Site
from spp_fx.graph.roles import (
    CASTS,
    EXPANDS,
    KEEPS,
    LOOKUPS,
    PARTS,
    REDUCTIONS,
    RESHAPES,
    SCALES,
    SUMS,
    SWAPS,
    Flow,
    Place,
    Read,
    dimensions_of,
    is_elementwise,
    role,
    sizes,
)
from spp_fx.passes.base import Pass, PassReport, register

aten = torch.ops.aten

# Contraction -> position of the weight -> does it contract the weight's last dimension?
MATRIX: dict[object, dict[int, bool]] = {
    aten.linear.default: {1: True},
    aten.addmm.default: {2: False},
    aten.mm.default: {1: False},
    aten.matmul.default: {1: False},
}
STACK: dict[object, dict[int, bool]] = {
    aten.bmm.default: {0: True, 1: False},
    aten._grouped_mm.default: {1: False},
}
KINDS: dict[object, Kind] = {
    aten.linear.default: "linear",
    aten.addmm.default: "conv1d",
    aten.mm.default: "matmul",
    aten.matmul.default: "matmul",
}
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


@dataclass(frozen=True)
class Contraction:
    """A node that multiplies an activation with a weight, reached from the weight through `chain`."""

    place: Place
    position: int
    transposed: bool
    chain: tuple[fx.Node, ...]

    @property
    def node(self) -> fx.Node:
        return self.place.node


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
        places = _places(program)
        embedded = {name for name, each in places.items() if any(_is_embedded(flow, p) for p in each)}
        found: dict[str, list[Contraction]] = {}
        left_out: dict[str, LeftOut] = {}
        for name, weight in _matrices(program).items():
            if name in program.sites:
                continue
            uses = _uses(flow, places.get(name, []), weight)
            if isinstance(uses, LeftOut):
                left_out[name] = uses
            else:
                found[name] = uses
        made = {name: _site(program, flow, name, uses, embedded) for name, uses in found.items()}
        for name, uses in found.items():
            program.sites[name] = made[name]
            for contraction in uses:
                _rewrite(flow.graph(contraction.place), contraction, name)
            report.changed[name] = f"{made[name].kind} {'x'.join(map(str, made[name].shape))}"
        program.left_out = _with_aliases(program, left_out)
        report.skipped.update((name, why.reason) for name, why in program.left_out.items())
        for _, module in program.graphs():
            module.recompile()
        return report

    def ensures(self, program: Program) -> None:
        unmarked = set(program.sites) - set(program.uses())
        if unmarked:
            raise PostconditionError(f"canonicalize: no node is marked for {', '.join(sorted(unmarked))}")


def stack_contractions() -> dict[object, dict[int, bool]]:
    """Contractions of stacks, with transformers' own grouped product where it is registered."""
    library = getattr(torch.ops, "transformers", None)
    fallback = getattr(library, "grouped_mm_fallback", None)
    return STACK | ({fallback.default: {1: False}} if fallback is not None else {})


def _matrices(program: Program) -> dict[str, nn.Parameter]:
    """Every parameter of two or more dimensions under each of its names in the checkpoint."""
    return {
        _name(path): parameter
        for path, parameter in program.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2
    }


def _places(program: Program) -> dict[str, list[Place]]:
    """The nodes that read each parameter."""
    found: dict[str, list[Place]] = {}
    for path, module in program.graphs():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                found.setdefault(_name(f"{path}.{node.target}".lstrip(".")), []).append(Place(path, node))
    return found


def _name(path: str) -> str:
    # A module called n times stands n times in the tree, as name, name@1, ...: one weight all the same.
    return re.sub(r"@\d+", "", path)


def _is_embedded(flow: Flow, place: Place) -> bool:
    return any(read.node.target in ROWS for read in flow.readers(place))


def _uses(flow: Flow, places: list[Place], weight: nn.Parameter) -> list[Contraction] | LeftOut:
    """The contractions of a weight, or why it is not a site."""
    reads = [read for place in places for read in flow.readers(place) if read.node.target not in ROWS]
    if not reads:
        return _without_reads(flow, places)
    contractions: list[Contraction] = []
    for read in reads:
        reached = _follow(read, weight) if weight.ndim in (2, 3) else None
        if not isinstance(reached, Contraction):
            return _table(flow, places) or LeftOut(reached or _used_by(flow, read, places), known=False)
        contractions.append(reached)
    cast = next((link for c in contractions for link in c.chain if _casts(link, weight)), None)
    if cast is not None:
        if role(flow, [c.place for c in contractions]) == ROUTES:
            return LeftOut(f"{ROUTES}, in another dtype than it is stored in", known=True)
        return LeftOut(f"is cast from {weight.dtype} by {cast.target} before it is used", known=False)
    if len({(c.transposed, _kind(c)) for c in contractions}) > 1:
        return LeftOut("is used in two orientations or forms", known=False)
    return contractions


def _without_reads(flow: Flow, places: list[Place]) -> LeftOut:
    if places and any(_is_embedded(flow, place) for place in places):
        return LeftOut("is an embedding: its rows are looked up", known=True)
    return LeftOut("is not read when the model is called with tokens", known=False)


def _follow(read: Read, weight: nn.Parameter) -> Contraction | str | None:
    """From a weight through transposes, casts and gathers to its contraction, or why that cannot be taken.

    None if what uses the weight is none of these ops.
    """
    contractions = MATRIX if weight.ndim == 2 else stack_contractions()
    source, user = read.operand, read.node
    if source.op != "get_attr":
        return f"is used by {user.target} in a module that does not own it"
    chain: list[fx.Node] = []
    swapped = False
    while user.target not in contractions:
        if user.target in SWAPS:
            if not _swaps_last_two(user, weight.ndim):
                return f"passes through {user.target}, which does not transpose its last two dimensions"
            swapped = not swapped
        elif user.target not in (*KEEPS, *CASTS) and not (weight.ndim == 3 and user.target in GATHERS):
            return None
        chain.append(user)
        if len(user.users) != 1:
            return f"the result of {user.target} on it is used {len(user.users)} times"
        source, user = user, next(iter(user.users))
    positions = [i for i, argument in enumerate(user.args) if argument is source]
    if len(positions) != 1 or positions[0] not in contractions[user.target]:
        return f"is an operand of {user.target} where no weight is expected"
    if user.target is aten.addmm.default and user.kwargs:
        return "is used by an addmm with factors"
    last = contractions[user.target][positions[0]]
    return Contraction(Place(read.path, user), positions[0], transposed=last == swapped, chain=tuple(chain))


def _casts(link: fx.Node, weight: nn.Parameter) -> bool:
    dtypes = [a for a in (*link.args[1:], *link.kwargs.values()) if isinstance(a, torch.dtype)]
    return link.target in CASTS and any(dtype != weight.dtype for dtype in dtypes)


def _results(flow: Flow, places: list[Place]) -> list[Read]:
    """The reads of a parameter, and of what is made of it and other constants alone, by ops that read other values."""
    found: list[Read] = []
    waiting, seen = list(places), set(places)
    while waiting:
        for read in flow.readers(waiting.pop()):
            if not flow.constant(read.place):
                found.append(read)
            elif read.place not in seen:
                seen.add(read.place)
                waiting.append(read.place)
    return found


def _table(flow: Flow, places: list[Place]) -> LeftOut | None:
    """Why a parameter is a table and not the weight of a linear, if all uses of it show that."""
    looked_up = False
    for read in _results(flow, places):
        values = [read]
        if read.node.target in ROWS:
            looked_up = True
            continue
        if read.node.target in LOOKUPS and read.node.args[0] is read.operand:
            looked_up = True
            values = list(_moved(flow, read.place))
        if not all(is_elementwise(each.node) and not _is_summed(flow, each) for each in values):
            return None
    if looked_up:
        return LeftOut("is a table: its rows are looked up", known=True)
    return LeftOut("is a table: it is only added or multiplied elementwise", known=True)


def _moved(flow: Flow, place: Place) -> Iterator[Read]:
    """The ops that read a value, past those that only move it or cast it."""
    for read in flow.readers(place):
        if read.node.target in (*RESHAPES, *SWAPS, *KEEPS, *CASTS, *EXPANDS):
            yield from _moved(flow, read.place)
        else:
            yield read


def _is_summed(flow: Flow, read: Read) -> bool:
    """Whether what an op makes of a table is summed along the table's own dimensions, as a linear's product is.

    A product with a value that is broadcast along the table has the form of a linear's: it is followed through all
    elementwise ops, and any op that may contract it counts. Other products, and sums that are broadcast so (a
    distance to each row), are followed through arithmetic with constants: past that, a scaled or shifted
    activation is a feature like any other, which norms and linears do contract.
    """
    shape = sizes(read.operand) or ()
    own = frozenset(d for d in range(-len(shape), 0) if shape[d] != 1)
    spread = len(own) > 1 and _is_spread(flow, read, own)
    scaled = read.node.target in PRODUCTS
    linear = scaled and spread
    waiting, seen = [(read.place, dimensions_of(read, own))], set[tuple[Place, frozenset[int]]]()
    while waiting:
        place, dims = waiting.pop()
        if (place, dims) in seen:
            continue
        seen.add((place, dims))
        for each in flow.readers(place):
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
                follow = linear or ((scaled or spread) and _is_alone(flow, each))
            elif target in (*RESHAPES, *SWAPS, *KEEPS, *CASTS, *EXPANDS):
                follow = True
            elif linear and target not in FOLLOWED:
                return True
            else:
                follow = linear
            if follow and (onward or not dims):
                waiting.append((each.place, onward))
    return False


def _is_spread(flow: Flow, read: Read, dims: frozenset[int]) -> bool:
    """Whether the other values that an op reads are broadcast along one of `dims` of its operand."""
    shapes = [
        sizes(other) or ()
        for other in read.node.all_input_nodes
        if other is not read.operand and not flow.constant(read.of(other))
    ]
    return bool(shapes) and any(all(len(s) < -d or s[d] == 1 for s in shapes) for d in dims)


def _is_alone(flow: Flow, read: Read) -> bool:
    """Whether an op reads one value and constants."""
    return all(other is read.operand or flow.constant(read.of(other)) for other in read.node.all_input_nodes)


def _used_by(flow: Flow, first: Read, places: list[Place]) -> str:
    users = list(dict.fromkeys(str(read.node.target) for read in _results(flow, places)))
    if str(first.node.target) in users:
        return f"is used by {', '.join(users)}, which is not a linear"
    return f"reaches {', '.join(users) or 'no op'} through {first.node.target}, which cannot be followed"


def _with_aliases(program: Program, left_out: dict[str, LeftOut]) -> dict[str, LeftOut]:
    """Left out parameters; one that is a site, or is known, under another name has that name as its reason."""
    result: dict[str, LeftOut] = {}
    for name, why in left_out.items():
        others = [
            o for o in _same(program, name) if o in program.sites or (o in left_out and left_out[o].known)
        ]
        if not why.known and others:
            why = LeftOut(f"is the same tensor as {others[0]}", known=True)
        result[name] = why
    return result


def _same(program: Program, name: str) -> list[str]:
    """The other names of a tied parameter."""
    first = program.tied.get(name, name)
    group = [first, *(other for other, owner in program.tied.items() if owner == first)]
    return [other for other in group if other != name]


def _swaps_last_two(node: fx.Node, ndim: int) -> bool:
    if node.target is aten.transpose.int:
        return {int(d) % ndim for d in node.args[1:3]} == {ndim - 2, ndim - 1}  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        dims = [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return dims == [*range(ndim - 2), ndim - 1, ndim - 2]
    return ndim == 2


def _kind(contraction: Contraction) -> Kind:
    kind = KINDS.get(contraction.node.target, "experts")
    return "linear" if kind == "conv1d" and not contraction.transposed else kind


def _site(program: Program, flow: Flow, name: str, uses: list[Contraction], embedded: set[str]) -> Site:
    weight = program.get_parameter(name)
    contraction = uses[0]
    shape = tuple(weight.shape)
    if contraction.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    group = {name, *_same(program, name)}
    return Site(
        name=name,
        kind=_kind(contraction),
        shape=shape,
        dtype=weight.dtype,
        transposed=contraction.transposed,
        layer=layer_of(name),
        uses=len(uses),
        tied_to=next(iter(sorted(group & embedded)), None),
        is_head=program.head in group,
        role=None if len(shape) == 3 else role(flow, [use.place for use in uses]),
    )


def _rewrite(module: fx.GraphModule, contraction: Contraction, name: str) -> None:
    """Replace a matrix contraction by aten.linear over the stored parameter; mark the node."""
    node = contraction.node
    if _kind(contraction) == "experts" or (node.target is aten.linear.default and not contraction.chain):
        node.meta[SITE] = name
        return
    bias, x = (node.args[0], node.args[1]) if node.target is aten.addmm.default else (None, node.args[0])
    if node.target is aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else None
    weight = contraction.chain[0].args[0] if contraction.chain else node.args[contraction.position]
    with module.graph.inserting_before(node):
        if contraction.transposed:
            weight = module.graph.call_function(aten.t.default, (weight,))
        arguments = (x, weight) if bias is None else (x, weight, bias)
        linear = module.graph.call_function(aten.linear.default, arguments)  # type: ignore[arg-type]
    linear.meta = dict(node.meta) | {SITE: name}
    node.replace_all_uses_with(linear)
    module.graph.erase_node(node)
    for link in reversed(contraction.chain):
        module.graph.erase_node(link)
