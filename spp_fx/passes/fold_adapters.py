"""fold: the adapters of a program into its weights."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from spp_fx.adapters import Factors, Method
from spp_fx.adapters.fold import fold_matrix
from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program, Site, Use, factor_attribute
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import unpack_site
from spp_fx.passes.inject_adapters import PLAIN, replace_node

aten = torch.ops.aten


@register("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Write every adapted site's effective weight into its parameter and take the adapter out.

    Args:
        vanish: what to do with a non-zero that would fold to zero: keep, error or allow.
    """

    name: ClassVar[str]
    vanish: str = "keep"

    def requires(self, program: Program) -> None:
        if not program.adapters:
            raise PreconditionError("fold: the program has no adapters; run inject first")
        if self.vanish not in ("keep", "error", "allow"):
            raise UsageError(f"fold: vanish takes keep, error or allow, got '{self.vanish}'")
        if program.device.type == "meta":
            raise PreconditionError("fold: the program is on the meta device and has no weights")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        for name in list(program.packings):
            unpack_site(program, name)
        uses = program.uses(ADAPTER)
        # All sites are folded before one is written: an error leaves the program as it was.
        folded: dict[str, list[Tensor]] = {}
        for name, method in program.adapters.items():
            counts = FoldCounts()
            factors = factors_of(program, name)
            folded[name] = _fold(program, name, method, factors, cast(Vanish, self.vanish), counts)
            report.changed[name] = f"{counts.changed} changed, {counts.vanished} vanished"
        for name, method in list(program.adapters.items()):
            target = program.canonical_weight(name).detach()
            with torch.no_grad():
                for matrix, value in zip(matrices(target), folded[name], strict=True):
                    matrix.copy_(value)
            for use in uses[name]:
                _take_out(use, program.sites[name])
            for module in {use.module for use in uses[name]}:
                _drop_factors(module, method, program.sites[name])
            del program.adapters[name]
        return report

    def ensures(self, program: Program) -> None:
        left = [*program.adapters, *program.uses(ADAPTER)]
        if left:
            raise PostconditionError(f"fold: adapters are left: {left[:4]}")


def factors_of(program: Program, site: str) -> dict[str, Tensor]:
    """A site's factors as the program holds them."""
    owner, _, parameter = site.rpartition(".")
    module = program.get_submodule(owner)
    method = program.adapters[site]
    return {
        key: module.get_parameter(factor_attribute(parameter, key)).detach()
        for key in method.factors(program.sites[site].shape)
    }


def matrices(weight: Tensor) -> list[Tensor]:
    """A weight's matrices (out, in) as views: itself, or one for each expert."""
    return list(weight) if weight.ndim == 3 else [weight]


def _fold(
    program: Program, name: str, method: Method, factors: Factors, vanish: Vanish, counts: FoldCounts
) -> list[Tensor]:
    weight = program.canonical_weight(name).detach()
    result: list[Tensor] = []
    for index, matrix in enumerate(matrices(weight)):
        own = {key: value[index] for key, value in factors.items()} if weight.ndim == 3 else factors
        where = f"{name}, expert {index}" if weight.ndim == 3 else name
        result.append(torch.cat(list(fold_matrix(method, matrix, own, vanish, counts, where))))
    return result


def _take_out(use: Use, site: Site) -> None:
    """Put the plain nodes back in place of an adapter's, whatever it was lowered to."""
    node, graph = use.node, use.module.graph
    named = {n.name: n for n in graph.nodes}
    plain = node.meta[PLAIN]
    if site.kind == "experts":
        replaced, by = (named.get(name, node) for name in plain)
    else:
        operands = tuple(named[name] for name in plain if name is not None)
        with graph.inserting_before(node):
            by = graph.call_function(aten.linear.default, operands)
        by.meta = {key: value for key, value in node.meta.items() if key not in (ADAPTER, PLAIN)}
        replaced = node
    replace_node(replaced, by)
    node.meta.pop(ADAPTER, None)


def _drop_factors(module: fx.GraphModule, method: Method, site: Site) -> None:
    """Remove what only the adapters of a site used, nodes and parameters, from a module of which they are gone."""
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for key in method.factors(site.shape):
        delattr(module, factor_attribute(site.name.rpartition(".")[2], key))
    module.recompile()
