"""Packing the frozen weight of an adapted site, and taking it out again."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spp_fx.adapters.op import MethodOps, ops_of
from spp_fx.adapters.rows import PACKINGS, choose_packing
from spp_fx.graph.program import ADAPTER, Program, Use
from spp_fx.graph.rewrite import call, change_call, readers

aten = torch.ops.aten


def pack_site(
    program: Program, site: str, uses: list[Use], device: torch.device | None = None
) -> tuple[str | None, str | None]:
    """Replace a site's parameter by packed ones, in every graph that uses it.

    Args:
        device: where to pack and to leave the packed ones; None: where the weight is.

    Returns:
        The packing chosen, or None and the reason why the weight stays dense.
    """
    reason = _dense_reason(program, site, uses)
    if reason is not None:
        return None, reason
    weight = program.canonical_weight(site).detach().to(device)
    name = choose_packing(weight)
    tensors = {
        key: nn.Parameter(value, requires_grad=False) for key, value in PACKINGS[name].pack(weight).items()
    }
    read_packed(program, site, uses, name, tensors)
    return name, None


def read_packed(
    program: Program, site: str, uses: list[Use], name: str, tensors: Mapping[str, nn.Parameter]
) -> None:
    """Let every use of a site read its packed weight in place of its parameter, which the program loses.

    Args:
        name: of the packing.
        tensors: the packed weight's, by the packing's names for them.
    """
    parameter, target = site.rpartition(".")[2], _ops(program, site).packed[name]
    for use in uses:
        for key, value in tensors.items():
            use.module.register_parameter(_packed(parameter, key), value)
        with use.module.graph.inserting_before(use.node):
            storage = [use.module.graph.get_attr(_packed(parameter, key)) for key in PACKINGS[name].tensors]
        x, _, *rest = use.node.args
        change_call(use.node, target, x, *storage, *rest)
    for module in {use.module for use in uses}:
        delattr(module, parameter)
        module.recompile()
    program.packings[site] = name


def packed_tensors(program: Program, site: str) -> dict[str, nn.Parameter]:
    """The packed weight of a site, by its packing's names for the tensors."""
    module, parameter = program.uses(ADAPTER)[site][0].module, site.rpartition(".")[2]
    return {
        key: module.get_parameter(_packed(parameter, key)) for key in PACKINGS[program.packings[site]].tensors
    }


def unpack_site(program: Program, site: str) -> None:
    """The inverse of `pack_site`: the parameter, and the fused op that reads it."""
    info, parameter = program.sites[site], site.rpartition(".")[2]
    weight = weight_of(program, site)
    packing = PACKINGS[program.packings.pop(site)]
    uses = program.uses(ADAPTER)[site]
    value = nn.Parameter(weight.t().contiguous() if info.transposed else weight, requires_grad=False)
    for use in uses:
        graph = use.module.graph
        use.module.register_parameter(parameter, value)
        with graph.inserting_before(use.node):
            source = graph.get_attr(parameter)
            if info.transposed:
                source = call(graph, aten.t.default, source)
        x, *rest = use.node.args
        change_call(use.node, _ops(program, site).fused, x, source, *rest[len(packing.tensors) :])
    for module in {use.module for use in uses}:
        for key in packing.tensors:
            delattr(module, _packed(parameter, key))
        module.recompile()


def _ops(program: Program, site: str) -> MethodOps:
    return ops_of(program.adapters[site], program.sites[site].shape)


def weight_of(program: Program, site: str) -> Tensor:
    """A site's weight in (out, in) or (experts, out, in) order: a view, or a copy where it is packed."""
    if site not in program.packings:
        return program.canonical_weight(site).detach()
    m, n = program.sites[site].shape
    return PACKINGS[program.packings[site]].rows(*packed_tensors(program, site).values(), (m, n)).take(0, m)


def _dense_reason(program: Program, site: str, uses: list[Use]) -> str | None:
    if program.sites[site].kind == "experts":
        return "a stack of experts stays dense"
    if any(use.node.target not in (_ops(program, site).linear, _ops(program, site).fused) for use in uses):
        return "it is used by code that runs as it is"
    if site in program.tied or site in program.tied.values():
        return "its weight is tied to another name"
    parameter = site.rpartition(".")[2]
    for use in uses:
        sources = use.module.graph.find_nodes(op="get_attr", target=parameter)
        if any(reader.meta.get(ADAPTER) != site for node in sources for reader in readers(node)):
            return "something else reads its weight too"
    return None


def _packed(parameter: str, key: str) -> str:
    return f"{parameter}_{key}"
