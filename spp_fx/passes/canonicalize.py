"""canonicalize: find every linear in whatever form the graph wrote it, and give it one form.

| the graph has                                       | kind    | becomes                        |
|-----------------------------------------------------|---------|--------------------------------|
| linear(x, W, b)                                     | linear  | unchanged                      |
| addmm(b, x, W), W stored (in, out)                  | conv1d  | linear(x, t(W), b)             |
| matmul(x, t(W)) or mm(x, t(W))                      | matmul  | linear(x, W)                   |
| matmul(x, W), W stored (in, out)                    | matmul  | linear(x, t(W))                |
| a grouped or batched product with a stack of matrices | experts | unchanged: routing is its own |

The node that contracts a weight is marked with the site's name; the weight's canonical orientation is
known from then on.
"""

import re
from dataclasses import dataclass

import torch
from torch import fx, nn

from spp_fx.errors import PostconditionError
from spp_fx.ir.program import SITE, Program
from spp_fx.ir.site import Kind, Site
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
EMBEDDINGS = (aten.embedding.default,)
SWAPS = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
KEEPS = (aten.contiguous.default, aten.alias.default, aten.detach.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
GATHERS = (aten.index.Tensor, aten.index_select.default)


@dataclass(frozen=True)
class Contraction:
    """A node that multiplies an activation with a weight, reached from the weight through `chain`."""

    node: fx.Node
    position: int
    transposed: bool
    chain: tuple[fx.Node, ...]


@register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Give every linear of the program one form, orientation known."""

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        found: dict[str, list[tuple[fx.GraphModule, Contraction]]] = {}
        embedded: set[str] = set()
        for path, module in program.graphs():
            for node in module.graph.nodes:
                weight = _parameter(module, node)
                if weight is None or weight.ndim not in (2, 3):
                    continue
                name = _name(path, node)
                for user in node.users:
                    if user.target in EMBEDDINGS:
                        embedded.add(name)
                        continue
                    reached = _follow(node, user, weight)
                    if isinstance(reached, str):
                        report.refused[name] = reached
                    else:
                        found.setdefault(name, []).append((module, reached))
        for name, uses in found.items():
            if name in report.refused or name in program.sites:
                continue
            if len({(c.transposed, _kind(c)) for _, c in uses}) > 1:
                report.refused[name] = "is used in two orientations or forms"
                continue
            program.sites[name] = _site(program, name, uses, embedded)
            for module, contraction in uses:
                _rewrite(module, contraction, name)
            report.changed[name] = (
                f"{program.sites[name].kind} {'x'.join(map(str, program.sites[name].shape))}"
            )
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


def _parameter(module: fx.GraphModule, node: fx.Node) -> nn.Parameter | None:
    if node.op != "get_attr" or SITE in node.meta:
        return None
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, nn.Parameter) else None


def _name(path: str, node: fx.Node) -> str:
    # A module called n times stands n times in the tree, as name, name@1, ...: one weight all the same.
    return re.sub(r"@\d+", "", f"{path}.{node.target}".lstrip("."))


def _follow(source: fx.Node, user: fx.Node, weight: nn.Parameter) -> Contraction | str:
    """From a weight through transposes, casts and gathers to its contraction, or why there is none."""
    contractions = MATRIX if weight.ndim == 2 else stack_contractions()
    chain: list[fx.Node] = []
    swapped = False
    while user.target not in contractions:
        if user.target in SWAPS:
            if not _swaps_last_two(user, weight.ndim):
                return f"passes through {user.target}, which is no transpose of its last two dimensions"
            swapped = not swapped
        elif user.target in CASTS:
            dtype = next(
                (a for a in (*user.args[1:], *user.kwargs.values()) if isinstance(a, torch.dtype)), None
            )
            if dtype not in (None, weight.dtype):
                return f"is cast from {weight.dtype} to {dtype} before it is used"
        elif user.target not in KEEPS and not (weight.ndim == 3 and user.target in GATHERS):
            return f"is used by {user.target}, which is no linear"
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
    return Contraction(user, positions[0], transposed=last == swapped, chain=tuple(chain))


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


def _site(
    program: Program, name: str, uses: list[tuple[fx.GraphModule, Contraction]], embedded: set[str]
) -> Site:
    weight = program.get_parameter(name)
    contraction = uses[0][1]
    shape = tuple(weight.shape)
    if contraction.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    group = {name, program.tied.get(name, name)} | {
        other for other, first in program.tied.items() if first == program.tied.get(name, name)
    }
    layer = re.search(r"\.(\d+)\.", name)
    return Site(
        name=name,
        kind=_kind(contraction),
        shape=shape,
        dtype=weight.dtype,
        transposed=contraction.transposed,
        layer=int(layer[1]) if layer else None,
        uses=len(uses),
        tied_to=next(iter(sorted(group & embedded)), None),
        is_head=program.head in group,
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
