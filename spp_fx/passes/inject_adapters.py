"""inject: give every matched site an adapter."""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from spp_fx.adapters.method import METHODS, Method, check_update, initial_factor
from spp_fx.adapters.op import DROPOUT, DROPOUT_SEED, op_options, ops_of
from spp_fx.adapters.per_site import RANK, method_by_site, parse_override
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.leaves import held, sites_in_leaves
from spp_fx.graph.program import ADAPTER, Program, Site, Use, factor_attribute
from spp_fx.graph.rewrite import call, operand_chain, replace_node, training_flag
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
        overrides: other values of its numbers for some sites, `rank:down_proj@32`; see `method_by_site`.
        seed: of the factors' start.
        masks: keep each site's mask, a bit a weight, for `verify`.
    """

    name: ClassVar[str]
    method: Method = choice(METHODS, "spp")
    overrides: tuple[str, ...] = ()
    seed: int = 0
    masks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.overrides:
            parse_override(self.method, text)

    def requires(self, program: Program) -> None:
        if not program.matched:
            raise PreconditionError("inject: no site is matched; run match first")
        if program.adapters:
            raise PreconditionError("inject: the program has adapters already; fold them first")

    def apply(self, program: Program) -> PassReport:
        methods = method_by_site(self.method, self.overrides, program.matched)
        shapes = {name: program.sites[name].shape for name in program.matched}
        taken, skipped = adaptable(methods, shapes, self.overrides, sites_in_leaves(program))
        program.requires_grad_(False)
        report = PassReport(skipped=skipped)
        uses = program.uses()
        for name in taken:
            site, weight, method = program.sites[name], program.weight(name), methods[name]
            specs = method.factors(site.shape)
            factors = {
                key: nn.Parameter(initial_factor(spec, f"{name}.{key}", self.seed, weight.device))
                for key, spec in specs.items()
            }
            if self.masks and weight.device.type != "meta":
                program.masks[name] = pack_mask(weight.detach().cpu(), transposed=site.transposed)
            for use in uses[name]:
                _inject(use, method, site, factors)
            program.adapters[name] = method
            report.changed[name] = ", ".join(f"{k} {'x'.join(map(str, s.shape))}" for k, s in specs.items())
        for module in {use.module for name in taken for use in uses[name]}:
            module.recompile()
        return report

    def again(self, program: Program, first: Program) -> None:
        """Inject without masks, of which `first` has those of the real weights."""
        replace(self, masks=False).apply(program)

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
    methods: Mapping[str, Method],
    shapes: Mapping[str, tuple[int, ...]],
    overrides: Sequence[str] = (),
    inside: Collection[str] = (),
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sites that their methods take, and why they do not take the others.

    Args:
        methods: of the sites, by name; all of one class.
        shapes: of the sites, (out, in) or (experts, out, in), by name.
        overrides: those that the methods have, see `method_by_site`.
        inside: sites in leaves, see `sites_in_leaves`.

    Raises:
        UsageError: none is taken, or none of those that get their rank from an override; names the options that would
            work for all. Or the update of the method is wrong, see `check_update`.
    """
    skipped = {name: reason for name, shape in shapes.items() if (reason := methods[name].refusal(shape))}
    for name in shapes:
        if name in inside and dropout_of(methods[name]):
            skipped.setdefault(
                name, "is used by code that runs as it is, which has no place for dropout; set it to 0"
            )
    groups = {"": [*shapes]}
    for text in overrides if skipped else ():
        rule = parse_override(methods[next(iter(shapes))], text)
        groups[f" that '{rule.target}' names"] = [
            name for name in shapes if rule.option == RANK and rule.gives(name, methods[name])
        ]
    for which, names in groups.items():
        if names and skipped.keys() >= {*names}:
            remedy = methods[names[0]].remedy(shapes[name] for name in names)
            raise UsageError(
                f"{names[0]}: {skipped[names[0]]} ({len(names)} of {len(names)} sites{which})"
                + (f"; {remedy}" if remedy else "")
            )
    taken = tuple(name for name in shapes if name not in skipped)
    check_update(methods[taken[0]], shapes[taken[0]])
    return taken, skipped


def dropout_of(method: Method) -> float:
    """The probability on the adapter branch's input while training; 0 for a method without that option."""
    return getattr(method, "dropout", 0.0)


def _inject(use: Use, method: Method, site: Site, factors: Mapping[str, nn.Parameter]) -> None:
    parameter = site.name.rpartition(".")[2]
    attributes = [factor_attribute(parameter, key) for key in factors]
    owner, prefix = use.owner(site.name)
    for attribute, value in zip(attributes, factors.values(), strict=True):
        owner.register_parameter(attribute, value)
    rewrite = _inject_stack if site.kind == "experts" or use.node.target is held else _inject_linear
    rewrite(use.node, method, site, [prefix + attribute for attribute in attributes])


def _inject_linear(node: fx.Node, method: Method, site: Site, attributes: Sequence[str]) -> None:
    graph = node.graph
    x, weight, bias = (*node.args, None)[:3]
    with graph.inserting_before(node):
        factors = [graph.get_attr(attribute) for attribute in attributes]
        seed, p = _dropout(graph, method)
        linear = ops_of(method, site.shape).linear
        adapted = call(graph, linear, x, weight, *factors, bias, seed, *_options(graph, method), p)
    replace_node(node, adapted, **{ADAPTER: site.name})


def _inject_stack(node: fx.Node, method: Method, site: Site, attributes: Sequence[str]) -> None:
    """Feed the contraction the effective weight; with dropout, add a second contraction for the branch."""
    graph = node.graph
    chain, position = operand_chain(node, site.name.rpartition(".")[2])
    source = chain[0]
    with graph.inserting_before(source.next):
        factors = [graph.get_attr(attribute) for attribute in attributes]
        seed, p = _dropout(graph, method)
        canonical = call(graph, aten.transpose.int, source, -2, -1) if site.transposed else source
        base = 1.0 if seed is None else 0.0
        options = _options(graph, method)
        value = call(graph, ops_of(method, site.shape).weight, canonical, *factors, *options, base)
        stored = call(graph, aten.transpose.int, value, -2, -1) if site.transposed else value
    value.meta = {ADAPTER: site.name}
    if seed is None:
        reader = chain[1] if len(chain) > 1 else node
        source.replace_all_uses_with(stored, delete_user_cb=lambda user: user is reader)
        return
    arguments = list(node.args)
    with graph.inserting_before(node):
        branch_weight = stored
        for link in chain[1:]:
            branch_weight = call(graph, link.target, branch_weight, *link.args[1:], **link.kwargs)
        arguments[position] = branch_weight
        arguments[1 - position] = call(graph, DROPOUT, arguments[1 - position], seed, p)
    with graph.inserting_before(node.next):
        branch = call(graph, node.target, *arguments, **node.kwargs)
        total = call(graph, aten.add.Tensor, node, branch)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _options(graph: fx.Graph, method: Method) -> tuple[Any, ...]:
    """What the ops take; evaluation masks an update that is dense in training."""
    return op_options(method) if method.masked else op_options(method, training_flag(graph))


def _dropout(graph: fx.Graph, method: Method) -> tuple[fx.Node | None, fx.Node | float]:
    """The seed and probability of the branch's dropout: (None, 0.0) where there never is any."""
    if dropout_of(method) == 0:
        return None, 0.0
    p = call(graph, operator.mul, dropout_of(method), training_flag(graph))
    return call(graph, DROPOUT_SEED, p), p
