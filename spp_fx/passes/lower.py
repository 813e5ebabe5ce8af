"""lower: choose how adapter nodes are executed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from spp_fx.adapters.method import Method
from spp_fx.adapters.op import DROPOUT, MethodOps, ops_of
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program, Use
from spp_fx.graph.rewrite import inline, replace_node
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import pack_site

aten = torch.ops.aten
KERNELS = ("reference", "fused")


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
    kernel: str = "fused"
    storage: str = "dense"

    def requires(self, program: Program) -> None:
        if not program.adapters:
            raise PreconditionError("lower: the program has no adapters; run inject first")
        if self.kernel not in KERNELS:
            raise UsageError(f"lower: there is no kernel '{self.kernel}'; known: {', '.join(KERNELS)}")
        if self.storage not in ("dense", "packed"):
            raise UsageError(f"lower: storage takes dense or packed, got '{self.storage}'")
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
                report.changed[name] = _lower(use, method, ops, self.kernel)
                use.module.recompile()
            if self.storage == "packed":
                packed, reason = pack_site(program, name, uses[name])
                report.changed[name] += f", {packed}" if packed else ", dense"
                if reason:
                    report.skipped[name] = reason
        return report

    def ensures(self, program: Program) -> None:
        for name, uses in program.uses(ADAPTER).items():
            method = program.adapters.get(name)
            linear = ops_of(method, program.sites[name].shape).linear if method else None
            if method and any(use.node.target is linear for use in uses):
                raise PostconditionError(f"lower: {name} is still abstract")


def _lower(use: Use, method: Method, ops: MethodOps, kernel: str) -> str:
    node = use.node
    if node.target is ops.weight:
        if kernel == "fused":
            return "row blocks"
        _expand_weight(node, method, ops)
        return kernel
    if node.target is not ops.linear:
        raise PreconditionError(f"lower: {node.format_node()} is lowered already; start from inject")
    if kernel == "fused":
        node.target = ops.fused
    else:
        _expand_linear(node, method, ops)
    return kernel


def _expand_linear(node: fx.Node, method: Method, ops: MethodOps) -> None:
    """x W'^T + b, or with dropout x W^T + b + dropout(x) U^T, with W' and U in aten nodes."""
    graph, count = node.graph, len(ops.factors)
    x, weight, *rest = node.args
    factors, (bias, seed), p = rest[:count], rest[count : count + 2], rest[-1]
    with graph.inserting_before(node):
        if seed is None:
            effective = _inline(graph, method, ops, [weight, *factors], base=1.0)
            result = graph.call_function(aten.linear.default, (x, effective, bias))  # type: ignore[arg-type]
        else:
            update = _inline(graph, method, ops, [weight, *factors], base=0.0)
            base = graph.call_function(aten.linear.default, (x, weight, bias))  # type: ignore[arg-type]
            dropped = graph.call_function(DROPOUT, (x, seed, p))  # type: ignore[arg-type]
            branch = graph.call_function(aten.linear.default, (dropped, update))
            result = graph.call_function(aten.add.Tensor, (base, branch))
    replace_node(node, result)


def _expand_weight(node: fx.Node, method: Method, ops: MethodOps) -> None:
    with node.graph.inserting_before(node):
        weights = list(node.args[: 1 + len(ops.factors)])
        result = _inline(node.graph, method, ops, weights, base=float(node.args[-1]))  # type: ignore[arg-type]
    replace_node(node, result)


def _inline(graph: fx.Graph, method: Method, ops: MethodOps, arguments: list[Any], base: float) -> fx.Node:
    """The method's own definition as nodes: the effective weight, or for base 0 the update."""

    def definition(weight: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(ops.factors, values, strict=True))
        result = method.effective_weight(weight, **named) if base else method.update(weight, **named)
        return result.to(weight.dtype)

    return inline(graph, definition, arguments)
