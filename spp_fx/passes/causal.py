"""causal: attention without a mask where the mask is proven to be the causal one.

Under export, transformers makes an explicit (batch, 1, sequence, sequence) mask even where nothing is padded,
which keeps flash kernels out and costs memory. Here the nodes that make the mask become a module of their
own, which answers None for a batch whose mask is causal, and attention reads None as `is_causal`.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from spp_fx.errors import PostconditionError
from spp_fx.graph.program import Program, Use, child_path, is_size, opaque
from spp_fx.graph.trace import ATTENTION
from spp_fx.passes.base import Pass, PassReport, register

MASK_ARGUMENT = 3
"""Position of `attn_mask` in scaled_dot_product_attention."""


@register("causal")
@dataclass(frozen=True)
class Causal(Pass):
    """Set `is_causal` for batches whose mask is proven causal; others keep the mask that they had.

    A mask is treated if it depends on nothing but the attention mask and the batch's sizes, and is used by
    nothing but attention. The proof is made while running: for a batch without padding the mask of each new
    shape is computed once and compared, entry by entry, with the causal one. Whatever departs from it
    (padding, a sliding window shorter than the batch, a bias by distance) is masked as before.

    The report names graph modules, not sites: those whose attention changed.
    """

    name: ClassVar[str]

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        callers = program.calls()
        sources: dict[fx.Node, Use] = {}
        for path, module in program.graphs():
            for node in module.graph.find_nodes(op="call_function", target=ATTENTION):
                if (mask := _mask(node)) is not None:
                    source = _source(Use(path, module, mask), callers)
                    sources.setdefault(source.node, source)
        for source in sources.values():
            readers = list(_readers(source))
            reason = _obstacle(source, readers, callers)
            if reason is not None:
                report.skipped.update((use.path, reason) for use in readers if use.node.target == ATTENTION)
                continue
            _outline(source)
            for use in readers:
                use.node.target = attention
                use.module.recompile()
                report.changed[use.path] = "no mask where it is causal"
        return report

    def ensures(self, program: Program) -> None:
        for path, module in program.graphs():
            for node in module.graph.find_nodes(op="call_function", target=attention):
                if _mask(node) is None:
                    raise PostconditionError(f"causal: attention in {path} lost its mask")


@opaque
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """scaled_dot_product_attention (batch, heads, sequence, width) for which no mask means the causal one."""
    return ATTENTION(query, key, value, attn_mask, dropout_p, attn_mask is None, **options)


class MaskUnlessCausal(nn.Module):
    """The mask of a batch, or None where it is proven to be causal.

    Args:
        mask: the graph that makes the mask of the attention mask and of sizes.
        position: of the attention mask (batch, sequence) among its arguments.
    """

    def __init__(self, mask: fx.GraphModule, position: int) -> None:
        super().__init__()
        self.mask = mask
        self.position = position
        self.proven: dict[tuple[Any, ...], bool] = {}

    def forward(self, *args: Any) -> Tensor | None:
        attention_mask: Tensor = args[self.position]
        # Who compiles or exports wants one graph, without a look at the data: that is the masked one.
        if torch.compiler.is_compiling() or not bool((attention_mask == 1).all()):
            return self.mask(*args)
        # Without padding the attention mask is all ones: the mask is a function of shapes alone.
        key = tuple(tuple(each.shape) if isinstance(each, Tensor) else int(each) for each in args)
        if key not in self.proven:
            self.proven[key] = is_causal_mask(self.mask(*args), attention_mask.shape[-1])
        return None if self.proven[key] else self.mask(*args)


def is_causal_mask(mask: Tensor, length: int) -> bool:
    """Whether a mask (..., length, length) lets each token see itself and those before, and no other.

    Boolean masks are True where a key is seen; floating ones are added: 0 where it is seen, and -inf or the
    lowest finite number where not.
    """
    if mask.shape[-2:] != (length, length):
        return False
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == seen).all())
    hidden = mask <= torch.finfo(mask.dtype).min
    return bool(torch.where(seen, mask == 0, hidden).all())


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[MASK_ARGUMENT] if len(node.args) > MASK_ARGUMENT else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _source(use: Use, callers: dict[str, list[Use]]) -> Use:
    """The node that makes a value, found upwards through the arguments of module calls."""
    while use.node.op == "placeholder" and use.path in callers:
        caller = callers[use.path][-1]
        position = use.module.graph.find_nodes(op="placeholder").index(use.node)
        argument = caller.node.args[position] if caller.node.op == "call_module" else None
        if not isinstance(argument, fx.Node):
            return use
        use = Use(caller.path, caller.module, argument)
    return use


def _readers(source: Use) -> Iterator[Use]:
    """The nodes that read a value, found downwards through the arguments of module calls."""
    for node in source.node.users:
        child = source.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(child, fx.GraphModule):
            yield Use(source.path, source.module, node)
            continue
        for placeholder, argument in zip(child.graph.find_nodes(op="placeholder"), node.args, strict=False):
            if argument is source.node:
                yield from _readers(Use(child_path(source.path, node), child, placeholder))


def _obstacle(source: Use, readers: list[Use], callers: dict[str, list[Use]]) -> str | None:
    """Why a mask cannot be left out, or None."""
    for use in readers:
        if use.node.target != ATTENTION or _uses_as_more_than_mask(use.node):
            return f"{use.node.name} in {use.path or 'the root'} reads the mask too"
    nodes, inputs = _slice(source.node)
    for node in nodes:
        if node.op != "call_function" or _is_random(node):
            return f"the mask comes from {node.op} {node.target}"
    write = _write_through_a_view(source, nodes)
    if write is not None:
        return f"{write.name} writes into what the mask is made of"
    if all(is_size(node) for node in inputs):
        return "the mask does not depend on the attention mask"
    for node in inputs:
        origin = _source(Use(source.path, source.module, node), callers)
        if not is_size(node) and not (origin.path == "" and origin.node.target == "attention_mask"):
            return f"the mask depends on {origin.node.name}"
    return None


def _uses_as_more_than_mask(node: fx.Node) -> bool:
    mask = _mask(node)
    return mask is None or any(argument is mask for argument in node.args[:MASK_ARGUMENT])


def _slice(source: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that a value is made of, in order, and what enters them: placeholders and sizes."""
    inside: set[fx.Node] = set()
    inputs: dict[fx.Node, None] = {}
    waiting = [source]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" or is_size(node):
            inputs[node] = None
        elif node not in inside:
            inside.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in source.graph.nodes if node in inside], list(inputs)


def _write_through_a_view(source: Use, nodes: list[fx.Node]) -> fx.Node | None:
    """An in-place operation on the values of a slice that is no part of it: the slice would lack it."""
    inside, waiting = set(nodes), [Use(source.path, source.module, node) for node in nodes]
    while waiting:
        for use in _readers(waiting.pop()):
            schema = getattr(use.node.target, "_schema", None)
            if use.node in inside or (schema is None and use.node.target is not operator.getitem):
                continue
            if schema is not None and schema.is_mutable:
                return use.node
            # One of several results of a view is a view as well.
            if schema is None or any(result.alias_info is not None for result in schema.returns):
                inside.add(use.node)
                waiting.append(use)
    return None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _outline(source: Use) -> None:
    """Move the nodes of a mask into a module that runs them where they are needed."""
    owner, graph = source.module, source.module.graph
    nodes, inputs = _slice(source.node)
    inner = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = inner.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(copies[source.node])
    position = next(i for i, node in enumerate(inputs) if not is_size(node))
    name = _free_name(owner, "causal_mask")
    owner.add_module(name, MaskUnlessCausal(fx.GraphModule(nn.Module(), inner, class_name="Graph"), position))
    with graph.inserting_after(source.node):
        call = graph.call_module(name, tuple(inputs))
    call.meta = dict(source.node.meta)
    source.node.replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)
    owner.recompile()


def _free_name(owner: nn.Module, wanted: str) -> str:
    name, number = wanted, 1
    while hasattr(owner, name):
        name, number = f"{wanted}_{number}", number + 1
    return name
