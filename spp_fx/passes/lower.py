"""lower: choose how adapter nodes are executed."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, fx

from spp_fx.adapters.method import Method
from spp_fx.adapters.op import DROPOUT, MethodOps, ops_of
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program
from spp_fx.graph.rewrite import call, change_call, inline, replace_node
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import pack_site, packed_tensors, read_packed

aten = torch.ops.aten


@register("lower")
@dataclass(frozen=True)
class Lower(Pass):
    """Replace adapter nodes by an execution of them.

    Args:
        kernel: `reference` expands the definition into plain aten nodes; `fused` is a single op equal to
            it. Stacks of experts have one op, which bounds its temporaries like `fused`.
        storage: `dense`, or `packed` (kernel `fused` only): each frozen weight becomes values and positions
            (2:4) or values and a bit mask (any other pattern). Stacks of experts, and weights that
            something else uses too, stay dense, with that reason in the report.
    """

    name: ClassVar[str]
    kernel: Literal["reference", "fused"] = "fused"
    storage: Literal["dense", "packed"] = "dense"

    def requires(self, program: Program) -> None:
        if not program.adapters:
            raise PreconditionError("lower: the program has no adapters; run inject first")
        if self.storage == "packed" and self.kernel != "fused":
            raise UsageError("lower: packed storage is unpacked by the fused kernel; give kernel=fused")
        if self.storage == "packed" and program.device.type == "meta":
            raise PreconditionError("lower: the program is on the meta device; there is nothing to pack")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        uses = program.uses(ADAPTER)
        for name, method in program.adapters.items():
            ops = ops_of(method, program.sites[name].shape)
            for use in uses[name]:
                report.changed[name] = _lower(use.node, method, ops, self.kernel)
            if self.storage == "packed":
                packed, reason = pack_site(program, name, uses[name])
                report.changed[name] += f", {packed}" if packed else ", dense"
                if reason:
                    report.skipped[name] = reason
        dense = program.adapters.keys() - program.packings.keys()  # pack_site has recompiled the others
        for module in {use.module for name in dense for use in uses[name]}:
            module.recompile()
        return report

    def again(self, program: Program, first: Program) -> None:
        """Lower, and read the packed weights of `first`."""
        replace(self, storage="dense").apply(program)
        for name, uses in program.uses(ADAPTER).items():
            if name in first.packings:
                packed = packed_tensors(first, name)
                read_packed(program, name, uses, first.packings[name], packed)

    def ensures(self, program: Program) -> None:
        for name, uses in program.uses(ADAPTER).items():
            method = program.adapters.get(name)
            linear = ops_of(method, program.sites[name].shape).linear if method else None
            if method and any(use.node.target is linear for use in uses):
                raise PostconditionError(f"lower: {name} is still abstract")


def _lower(node: fx.Node, method: Method, ops: MethodOps, kernel: str) -> str:
    if node.target is ops.weight:
        if kernel == "fused":
            return "row blocks"
        _expand_weight(node, method, ops)
    elif node.target is not ops.linear:
        raise PreconditionError(f"lower: {node.format_node()} is lowered already; start from inject")
    elif kernel == "fused":
        change_call(node, ops.fused, *node.args)
    else:
        _expand_linear(node, method, ops)
    return kernel


def _expand_linear(node: fx.Node, method: Method, ops: MethodOps) -> None:
    """x W'^T + b, or with dropout x W^T + b + dropout(x) U^T, with W' and U in aten nodes."""
    graph, count = node.graph, len(ops.factors)
    x, weight, *rest = node.args
    factors, (bias, seed), (dense, p) = rest[:count], rest[count : count + 2], rest[-2:]
    with graph.inserting_before(node):
        if seed is None:
            effective = _inline(graph, method, ops, [weight, *factors], dense, base=1.0)
            result = call(graph, aten.linear.default, x, effective, bias)
        else:
            update = _inline(graph, method, ops, [weight, *factors], dense, base=0.0)
            base = call(graph, aten.linear.default, x, weight, bias)
            dropped = call(graph, DROPOUT, x, seed, p)
            branch = call(graph, aten.linear.default, dropped, update)
            result = call(graph, aten.add.Tensor, base, branch)
    replace_node(node, result)


def _expand_weight(node: fx.Node, method: Method, ops: MethodOps) -> None:
    weights: list[Any] = list(node.args[: 1 + len(ops.factors)])
    dense, base = cast(tuple[Any, Any], node.args[-2:])
    with node.graph.inserting_before(node):
        result = _inline(node.graph, method, ops, weights, dense, base)
    replace_node(node, result)


def _inline(
    graph: fx.Graph, method: Method, ops: MethodOps, weights: list[Any], dense: Any, base: float
) -> fx.Node:
    """The method's own definition as nodes: the effective weight, or for base 0 the update.

    Args:
        dense: for a method that is not `masked`, the node that says whether its update is dense.
    """

    def update(weight: Tensor, *values: Tensor) -> Tensor:
        return method.update(weight, **dict(zip(ops.factors, values, strict=True)))

    def definition(weight: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(ops.factors, values, strict=True))
        result = method.effective_weight(weight, **named) if base else method.update(weight, **named)
        return result.to(weight.dtype)

    if method.masked:
        return inline(graph, definition, weights)
    weight = weights[0]
    kept = call(graph, aten.bitwise_or.Scalar, call(graph, aten.ne.Scalar, weight, 0), dense)
    result = call(graph, aten.mul.Tensor, inline(graph, update, weights), kept)
    if base:
        result = call(graph, aten.add.Tensor, weight, result)
    return call(graph, aten.type_as.default, result, weight)
