"""fold: the adapters of a program into its weights."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from spp_fx.adapters.fold import FoldCounts, Vanish, fold_matrix, round_once
from spp_fx.adapters.method import Factors, Method
from spp_fx.adapters.op import ops_of
from spp_fx.errors import MaskError, PostconditionError, PreconditionError
from spp_fx.graph.leaves import held
from spp_fx.graph.program import ADAPTER, Program, Site, factor_attribute, matrices
from spp_fx.graph.rewrite import VIEWS, erase_unused, reach, readers, replace_by_call
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import unpack_site
from spp_fx.passes.inject_adapters import dropout_of
from spp_fx.passes.train_norms import freeze_norms

aten = torch.ops.aten


@register("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Write every adapted site's effective weight into its parameter and take the adapter out.

    Norms and biases that were trained are rounded once to the model's dtype.

    Args:
        vanish: what to do with a non-zero that would fold to zero: keep, error or allow.
    """

    name: ClassVar[str]
    vanish: Vanish = "keep"

    def requires(self, program: Program) -> None:
        if not program.adapters:
            raise PreconditionError("fold: the program has no adapters; run inject first")
        if program.device.type == "meta":
            raise PreconditionError("fold: the program is on the meta device and has no weights")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        for name in list(program.packings):
            unpack_site(program, name)
        # All sites are folded before one is written: an error leaves the program as it was.
        folded: dict[str, list[Tensor]] = {}
        for name, method in program.adapters.items():
            counts = FoldCounts()
            factors = factors_of(program, name)
            folded[name] = _fold(program, name, method, factors, self.vanish, counts)
            report.changed[name] = f"{counts.changed} changed, {counts.vanished} folded to zero" + (
                f", {counts.removed} removed by the mask" if counts.removed else ""
            )
        rounded = {name: _rounded(program, name) for name in program.trained}
        for name, values in folded.items():
            target = program.canonical_weight(name).detach()
            with torch.no_grad():
                for matrix, value in zip(matrices(target), values, strict=True):
                    matrix.copy_(value)
        _take_out_all(program)
        report.changed.update(dict.fromkeys(rounded, "trained"))
        freeze_norms(program, rounded)
        return report

    def again(self, program: Program, first: Program) -> None:
        """Take the adapters out; `first` has the folded weights."""
        _take_out_all(program)
        freeze_norms(
            program,
            {name: program.get_parameter(name).detach().to(dtype) for name, dtype in program.trained.items()},
        )

    def ensures(self, program: Program) -> None:
        left = [*program.adapters, *program.uses(ADAPTER)]
        if left:
            raise PostconditionError(f"fold: adapters are left: {left[:4]}")


def _take_out_all(program: Program) -> None:
    """Put the plain nodes back in place of every adapter's, and remove the factors."""
    uses = program.uses(ADAPTER)
    for name, method in list(program.adapters.items()):
        for use in uses[name]:
            _take_out(use.node, method, program.sites[name])
        for owner in {use.owner(name)[0] for use in uses[name]}:
            for key in method.factors(program.sites[name].shape):
                delattr(owner, factor_attribute(name.rpartition(".")[2], key))
        del program.adapters[name]
    for module in {use.module for each in uses.values() for use in each}:
        module.recompile()


def _rounded(program: Program, name: str) -> Tensor:
    value = round_once(program.get_parameter(name).detach().double(), program.trained[name])
    if not bool(value.isfinite().all()):
        raise MaskError(f"{name}: is not finite; nothing is folded. Train with a lower --lr")
    return value


def factors_of(program: Program, site: str) -> dict[str, Tensor]:
    """A site's factors as the program holds them."""
    owner, _, parameter = site.rpartition(".")
    module = program.get_submodule(owner)
    method = program.adapters[site]
    return {
        key: module.get_parameter(factor_attribute(parameter, key)).detach()
        for key in method.factors(program.sites[site].shape)
    }


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


def _take_out(node: fx.Node, method: Method, site: Site) -> None:
    """Put the plain nodes back in place of an adapter's, in any lowered form."""
    if site.kind == "experts" or any(reader.target is held for reader in readers(node)):
        _take_out_stack(node, method, site)
        return
    ops, count = ops_of(method, site.shape), len(method.factors(site.shape))
    if node.target in (ops.linear, ops.fused):
        x, weight, bias = node.args[0], node.args[1], node.args[2 + count]
    elif dropout_of(method):  # the reference: linear(x, weight, bias) + linear(dropout(x), update)
        x, weight, bias = (*cast(fx.Node, node.args[0]).args, None)[:3]
    else:  # linear(x, effective weight, bias)
        x, effective, bias = (*node.args, None)[:3]
        weight = _canonical(cast(fx.Node, effective), method, site)
    del node.meta[ADAPTER]
    replace_by_call(node, aten.linear.default, x, weight, *([] if bias is None else [bias]))


def _take_out_stack(node: fx.Node, method: Method, site: Site) -> None:
    """`node` makes the effective stack, or with dropout the update of a second contraction that is added."""
    if dropout_of(method):
        branch, total = node, next(iter(node.users))
        while total.target is not aten.add.Tensor or total.args[1] is not branch:
            branch, total = total, next(iter(total.users))
        total.replace_all_uses_with(cast(fx.Node, total.args[0]))
        erase_unused(total)
        return
    source = _canonical(node, method, site)
    if site.transposed:
        node, source = next(iter(node.users)), cast(fx.Node, source.args[0])
    node.replace_all_uses_with(source)
    erase_unused(node)


def _canonical(made: fx.Node, method: Method, site: Site) -> fx.Node:
    """The frozen weight, as (..., out, in), that an effective weight is made from."""
    parameter = site.name.rpartition(".")[2]
    own = {factor_attribute(parameter, key) for key in method.factors(site.shape)} | {"training"}
    made_of = reach([made], lambda node: node.all_input_nodes)
    (source,) = (each for each in made_of if each.op == "get_attr" and _attribute(each) not in own)
    return next(user for user in source.users if user.target in VIEWS) if site.transposed else source


def _attribute(node: fx.Node) -> str:
    """The name of the parameter or factor that a node reads, without its module's."""
    return str(node.target).rpartition(".")[2]
