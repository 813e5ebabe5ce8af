"""lower: choose how adapter nodes are executed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from spp_fx.adapters import Method
from spp_fx.adapters.ops.dropout import DROPOUT
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program, Use
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import pack_site
from spp_fx.passes.inject_adapters import replace_node

aten = torch.ops.aten
REFERENCE = "reference"


@register("lower")
@dataclass(frozen=True)
class Lower(Pass):
    """Replace adapter nodes by an execution of them.

    Args:
        kernel: `reference` expands the definition into plain aten nodes; `blockwise` and `fused` (and
            whatever else a method brings) are single ops equal to it. Stacks of experts have one
            op, which bounds its temporaries like `fused`.
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
            known = (REFERENCE, *method.ops.kernels)
            if self.kernel not in known:
                raise UsageError(
                    f"lower: {method.name} has no kernel '{self.kernel}'; known: {', '.join(known)}"
                )
            for use in uses[name]:
                report.changed[name] = _lower(use, method, self.kernel)
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
            if method and any(use.node.target is method.ops.linear for use in uses):
                raise PostconditionError(f"lower: {name} is still abstract")


def _lower(use: Use, method: Method, kernel: str) -> str:
    node = use.node
    if node.target is method.ops.weight:
        if kernel == REFERENCE:
            _expand_weight(use.module.graph, node, method)
        return kernel if kernel == REFERENCE else "row blocks"
    if node.target is not method.ops.linear:
        raise PreconditionError(f"lower: {node.format_node()} is lowered already; start from inject")
    if kernel == REFERENCE:
        _expand_linear(use.module.graph, node, method)
    else:
        node.target = method.ops.kernels[kernel]
    return kernel


def _expand_linear(graph: fx.Graph, node: fx.Node, method: Method) -> None:
    """x W'^T + b, or with dropout x W^T + b + dropout(x) U^T, with W' and U in aten nodes."""
    x, weight, *factors, bias, seed, _, p = node.args
    with graph.inserting_before(node):
        if seed is None:
            effective = _inline(graph, method, weight, factors, base=1.0)  # type: ignore[arg-type]
            result = graph.call_function(aten.linear.default, (x, effective, bias))  # type: ignore[arg-type]
        else:
            update = _inline(graph, method, weight, factors, base=0.0)  # type: ignore[arg-type]
            base = graph.call_function(aten.linear.default, (x, weight, bias))  # type: ignore[arg-type]
            dropped = graph.call_function(DROPOUT, (x, seed, p))  # type: ignore[arg-type]
            branch = graph.call_function(aten.linear.default, (dropped, update))
            result = graph.call_function(aten.add.Tensor, (base, branch))
    _replace(graph, node, result)


def _expand_weight(graph: fx.Graph, node: fx.Node, method: Method) -> None:
    weight, *factors, _, base = node.args
    with graph.inserting_before(node):
        result = _inline(graph, method, weight, factors, base=float(base))  # type: ignore[arg-type]
    _replace(graph, node, result)


def _replace(graph: fx.Graph, node: fx.Node, result: fx.Node) -> None:
    result.meta = dict(node.meta)
    replace_node(node, result)
    graph.erase_node(node)


def _inline(graph: fx.Graph, method: Method, weight: fx.Node, factors: list[fx.Node], base: float) -> fx.Node:
    """The method's own definition, traced on tensors without storage, as nodes in front of the current point."""
    shape_of = {node: _shape(graph, node) for node in (weight, *factors)}
    names = list(method.factors(tuple(shape_of[weight][0])))

    def definition(w: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        result = method.effective_weight(w, **named) if base else method.update(w, **named)
        return result.to(w.dtype)

    examples = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in shape_of.values()]
    traced = make_fx(definition)(*examples)
    values: dict[fx.Node, fx.Node] = dict(
        zip((n for n in traced.graph.nodes if n.op == "placeholder"), shape_of, strict=True)
    )
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            values[inner] = graph.node_copy(inner, lambda n: values[n])
        elif inner.op == "output":
            return values[inner.args[0]]  # type: ignore[index]
    raise PreconditionError(f"lower: the definition of {method.name} has no output")


def _shape(graph: fx.Graph, node: fx.Node) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a parameter or of a transposed view of one."""
    if node.op == "get_attr":
        module = graph.owning_module
        value = module.get_parameter(str(node.target)) if module is not None else None
        if value is None:
            raise PreconditionError(f"lower: {node.target} is no parameter")
        return value.shape, value.dtype
    size, dtype = _shape(graph, node.args[0])  # type: ignore[arg-type]
    if node.target in (aten.t.default, aten.transpose.int):
        return torch.Size((*size[:-2], size[-1], size[-2])), dtype
    raise PreconditionError(f"lower: {node.format_node()} is no canonical weight")
