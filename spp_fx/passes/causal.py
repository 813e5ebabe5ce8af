"""causal: attention without a mask where the mask is proven to be the causal one.

Under export, transformers makes an explicit (batch, 1, sequence, sequence) mask even where nothing is padded,
which keeps flash kernels out and costs memory. Here the nodes that make the mask become a module of their
own, which answers None for a batch whose mask is causal, and attention reads None as `is_causal`.
"""

import operator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from spp_fx.errors import PostconditionError
from spp_fx.graph.dropout import ATTENTION
from spp_fx.graph.flow import Flow, Read, Value
from spp_fx.graph.program import Program, is_size, opaque
from spp_fx.graph.rewrite import extract, reach, replace_node
from spp_fx.passes.base import Pass, PassReport, register

MASK_ARGUMENT = 3
"""Position of `attn_mask` in scaled_dot_product_attention."""


@register("causal")
@dataclass(frozen=True)
class Causal(Pass):
    """Set `is_causal` for batches whose mask is proven causal; others keep the mask that they had.

    A mask is treated if it depends on nothing but the attention mask and the batch's sizes, and is used by
    nothing but attention. The proof is made while running: for a batch without padding the mask of each new
    shape is computed once and compared, entry by entry, with the causal one. Batches with another mask
    (padding, a sliding window shorter than the batch, a bias by distance) are masked as before.

    The report names graph modules, not sites: those whose attention changed.
    """

    name: ClassVar[str]

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        flow = Flow(program)
        sources = {
            source.node: source
            for path, module in program.graphs()
            for node in module.graph.find_nodes(op="call_function", target=ATTENTION)
            if (mask := _mask(node)) is not None
            for source in flow.sources(Value(path, mask))
        }
        reads = {node: list(flow.readers(source)) for node, source in sources.items()}
        obstacles = {node: _obstacle(flow, source, reads[node]) for node, source in sources.items()}
        changed: set[fx.GraphModule] = set()
        for node, reason in obstacles.items():
            for read in reads[node]:
                if reason is None:
                    read.node.target = attention
                    changed.add(flow.graph(read.result))
                    report.changed[read.result.path] = "no mask where it is causal"
                elif read.node.target == ATTENTION:
                    report.skipped[read.result.path] = reason
            if reason is None:
                _move_out(flow.graph(sources[node]), node)
                changed.add(flow.graph(sources[node]))
        for module in changed:
            module.recompile()
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
        # torch.compile and export need a graph that does not depend on the data: the masked one.
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


def _obstacle(flow: Flow, source: Value, reads: list[Read]) -> str | None:
    """Why a mask cannot be left out, or None."""
    for read in reads:
        if read.node.target != ATTENTION or read.operand in read.node.args[:MASK_ARGUMENT]:
            return f"{read.node.name} in {read.result.path or 'the root'} reads the mask too"
    nodes, inputs = _slice(source.node)
    for node in nodes:
        if node.op != "call_function" or _is_random(node):
            return f"the mask comes from {node.op} {node.target}"
    write = _write_through_a_view(flow, [source.beside(node) for node in nodes])
    if write is not None:
        return f"{write.name} writes into what the mask is made of"
    if all(is_size(node) for node in inputs):
        return "the mask does not depend on the attention mask"
    for node in inputs:
        for origin in () if is_size(node) else flow.sources(source.beside(node)):
            if origin.path != "" or origin.node.target != "attention_mask":
                return f"the mask depends on {origin.node.name}"
    return None


def _slice(source: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that a value is made of, in order, and what enters them: placeholders and sizes."""

    def enters(node: fx.Node) -> bool:
        return node.op == "placeholder" or is_size(node)

    reached = list(reach([source], lambda node: [] if enters(node) else node.all_input_nodes))
    inside = {node for node in reached if not enters(node)}
    return [node for node in source.graph.nodes if node in inside], [node for node in reached if enters(node)]


def _write_through_a_view(flow: Flow, values: list[Value]) -> fx.Node | None:
    """An in-place operation on the values of a slice that is not part of it: the slice would lack it."""
    inside, waiting = {value.node for value in values}, list(values)
    while waiting:
        for read in flow.readers(waiting.pop()):
            schema = getattr(read.node.target, "_schema", None)
            if read.node in inside or (schema is None and read.node.target is not operator.getitem):
                continue
            if schema is not None and schema.is_mutable:
                return read.node
            # One of several results of a view is a view as well.
            if schema is None or any(result.alias_info is not None for result in schema.returns):
                inside.add(read.node)
                waiting.append(read.result)
    return None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _move_out(owner: fx.GraphModule, source: fx.Node) -> None:
    """Move the nodes of a mask into a module that runs them where they are needed."""
    nodes, inputs = _slice(source)
    position = next(i for i, node in enumerate(inputs) if not is_size(node))
    name = _free_name(owner, "causal_mask")
    owner.add_module(name, MaskUnlessCausal(extract(nodes, inputs, source), position))
    with owner.graph.inserting_after(source):
        call = owner.graph.call_module(name, tuple(inputs))
    replace_node(source, call)


def _free_name(owner: nn.Module, wanted: str) -> str:
    numbered = (f"{wanted}_{number}" if number else wanted for number in count())
    return next(name for name in numbered if not hasattr(owner, name))
