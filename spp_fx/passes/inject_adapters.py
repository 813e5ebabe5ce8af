"""inject: give every matched site an adapter."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from spp_fx.adapters.method import METHODS, Method, initial_factor
from spp_fx.adapters.op import DROPOUT, DROPOUT_SEED, op_options, ops_of
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, SITE, Program, Use, factor_attribute
from spp_fx.graph.rewrite import operand_chain, replace_node
from spp_fx.options import choice
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.sparsity.scan import pack_mask

aten = torch.ops.aten


@register("inject")
@dataclass(frozen=True)
class Inject(Pass):
    """Turn every matched linear node into an adapter node; freeze everything but the new factors.

    Args:
        method: the adapter method.
        seed: of the factors' start.
        masks: keep each site's mask, a bit a weight, for `verify`.
    """

    name: ClassVar[str]
    method: Method = choice(METHODS, "spp")
    seed: int = 0
    masks: bool = True

    def requires(self, program: Program) -> None:
        if not program.matched:
            raise PreconditionError("inject: no site is matched; run match first")
        if program.adapters:
            raise PreconditionError("inject: the program has adapters already; fold them first")

    def apply(self, program: Program) -> PassReport:
        method = self.method
        taken, skipped = adaptable(method, {name: program.sites[name].shape for name in program.matched})
        program.requires_grad_(False)
        report = PassReport(skipped=skipped)
        uses = program.uses()
        for name in taken:
            site, weight = program.sites[name], program.weight(name)
            specs = method.factors(site.shape)
            factors = {
                key: nn.Parameter(initial_factor(spec, f"{name}.{key}", self.seed, weight.device))
                for key, spec in specs.items()
            }
            if self.masks and weight.device.type != "meta":
                program.masks[name] = pack_mask(weight.detach().cpu(), transposed=site.transposed)
            for use in uses[name]:
                rewrite = _inject_stack if site.kind == "experts" else _inject_linear
                rewrite(use, method, site.shape, name.rpartition(".")[2], factors, site.transposed)
                use.module.recompile()
            program.adapters[name] = method
            report.changed[name] = ", ".join(f"{k} {'x'.join(map(str, s.shape))}" for k, s in specs.items())
        return report

    def ensures(self, program: Program) -> None:
        trained = {name for name, p in program.named_parameters() if p.requires_grad}
        expected = {
            f"{site.rpartition('.')[0]}.{factor_attribute(site.rpartition('.')[2], factor)}"
            for site, method in program.adapters.items()
            for factor in method.factors(program.sites[site].shape)
        }
        if trained != expected:
            raise PostconditionError(
                f"inject: unexpected trainable parameters {sorted(trained ^ expected)[:4]}"
            )


def adaptable(
    method: Method, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sites that a method takes, and why it does not take the others.

    Args:
        shapes: of the sites, (out, in) or (experts, out, in), by name.

    Raises:
        UsageError: it takes none; names the options that would work for all.
    """
    skipped = {name: reason for name, shape in shapes.items() if (reason := method.refusal(shape))}
    if len(skipped) == len(shapes):
        name, reason = next(iter(skipped.items()))
        remedy = method.remedy(shapes.values())
        raise UsageError(
            f"{name}: {reason} ({len(skipped)} of {len(shapes)} sites)" + (f"; {remedy}" if remedy else "")
        )
    return tuple(name for name in shapes if name not in skipped), skipped


def _factor_nodes(use: Use, parameter: str, factors: dict[str, nn.Parameter]) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    for key, value in factors.items():
        attribute = factor_attribute(parameter, key)
        use.module.register_parameter(attribute, value)
        nodes.append(use.module.graph.get_attr(attribute))
    return nodes


def dropout_of(method: Method) -> float:
    """The probability on the adapter branch's input while training; 0 for a method without that option."""
    return getattr(method, "dropout", 0.0)


def _dropout_nodes(graph: fx.Graph, method: Method) -> tuple[fx.Node | None, fx.Node | float]:
    """The seed and probability of the branch's dropout: (None, 0.0) where there never is any."""
    if dropout_of(method) == 0:
        return None, 0.0
    training = graph.create_node("get_attr", "training")
    p = graph.call_function(operator.mul, (dropout_of(method), training))
    return graph.call_function(DROPOUT_SEED, (p,)), p


def _inject_linear(
    use: Use,
    method: Method,
    shape: tuple[int, ...],
    parameter: str,
    factors: dict[str, nn.Parameter],
    transposed: bool,
) -> None:
    node, graph = use.node, use.module.graph
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.inserting_before(node):
        nodes = _factor_nodes(use, parameter, factors)
        seed, p = _dropout_nodes(graph, method)
        arguments = (x, weight, *nodes, bias, seed, *op_options(method), p)
        adapted = graph.call_function(ops_of(method, shape).linear, arguments)  # type: ignore[arg-type]
    replace_node(node, adapted, **{ADAPTER: node.meta[SITE]})


def _inject_stack(
    use: Use,
    method: Method,
    shape: tuple[int, ...],
    parameter: str,
    factors: dict[str, nn.Parameter],
    transposed: bool,
) -> None:
    """Feed the contraction the effective weight; with dropout, add a second contraction for the branch."""
    node, graph = use.node, use.module.graph
    chain, position = operand_chain(node, parameter)
    source = chain[0]
    with graph.inserting_before(source.next):
        nodes = _factor_nodes(use, parameter, factors)
        seed, p = _dropout_nodes(graph, method)
        canonical = graph.call_function(aten.transpose.int, (source, -2, -1)) if transposed else source
        arguments = (canonical, *nodes, *op_options(method), 1.0 if seed is None else 0.0)
        value = graph.call_function(ops_of(method, shape).weight, arguments)
        stored = graph.call_function(aten.transpose.int, (value, -2, -1)) if transposed else value
    value.meta = {ADAPTER: node.meta[SITE]}
    if seed is None:
        reader = chain[1] if len(chain) > 1 else node
        source.replace_all_uses_with(stored, delete_user_cb=lambda user: user is reader)
        return
    with graph.inserting_before(node):
        replay: Any = stored
        for link in chain[1:]:
            replay = graph.call_function(link.target, (replay, *link.args[1:]), dict(link.kwargs))  # type: ignore[arg-type]
        arguments = list(node.args)
        arguments[position] = replay
        x = 1 - position
        arguments[x] = graph.call_function(DROPOUT, (arguments[x], seed, p))  # type: ignore[arg-type]
    with graph.inserting_before(node.next):
        branch = graph.call_function(node.target, tuple(arguments), dict(node.kwargs))  # type: ignore[arg-type]
        total = graph.call_function(aten.add.Tensor, (node, branch))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
