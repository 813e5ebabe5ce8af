"""train-norms: train the norms and biases of the decoder beside the factors of adapters."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.names import names_of
from spp_fx.graph.program import Program, child_path
from spp_fx.graph.rewrite import cast_result, drop_cast
from spp_fx.passes.base import Pass, PassReport, register


@register("train-norms")
@dataclass(frozen=True)
class TrainNorms(Pass):
    """Train vectors: weights and biases of norms, and biases of linears; see `vectors`.

    Each becomes a float32 parameter (float64 where it is one), which the graph casts to the model's dtype at every use:
    the steps of half precision are larger than those of an optimizer.

    Args:
        names: the parameters to train; none means all that `vectors` finds.
    """

    name: ClassVar[str]
    names: tuple[str, ...] = ()

    def requires(self, program: Program) -> None:
        if not program.adapters:
            raise PreconditionError("train-norms: the program has no adapters; run inject first")
        if program.trained:
            raise PreconditionError("train-norms: they are trained already")

    def apply(self, program: Program) -> PassReport:
        found, skipped = vectors(program)
        if unknown := [name for name in self.names if name not in found]:
            reason = skipped.get(unknown[0], "the model has no such norm or bias")
            raise UsageError(f"train-norms: {unknown[0]}: {reason}")
        chosen = self.names or found
        if not chosen:
            raise UsageError("train-norms: the model has no norm or bias to train")
        report = PassReport(skipped=skipped)
        changed = set[fx.GraphModule]()
        names, readers = names_of(program), _readers(program)
        for name in chosen:
            old = program.get_parameter(name)
            dtype = torch.promote_types(old.dtype, torch.float32)
            if dtype != old.dtype:
                for module, node in readers[old]:
                    cast_result(node, old.dtype)
                    changed.add(module)
            _replace(program, names[old], nn.Parameter(old.detach().to(dtype, copy=True)))
            program.trained[name] = old.dtype
            report.changed[name] = f"{old.numel()} numbers"
        for module in changed:
            module.recompile()
        return report

    def ensures(self, program: Program) -> None:
        frozen = [name for name in program.trained if not program.get_parameter(name).requires_grad]
        if frozen:
            raise PostconditionError(f"train-norms: {frozen[0]} is frozen")


def vectors(program: Program) -> tuple[tuple[str, ...], dict[str, str]]:
    """The parameters that train-norms takes, and why it leaves other vectors.

    They are the parameters of one dimension that a graph reads: of norms in and after the decoder layers and of
    embeddings, and biases of linears. Left out is what belongs to the head, which is not adapted by default either.
    """
    read = _readers(program)
    head = None if program.head_weight is None else program.head_weight.rpartition(".")[0]
    found: list[str] = []
    skipped: dict[str, str] = {}
    for name, parameter in program.named_parameters():
        if parameter.ndim != 1 or parameter.requires_grad or name in program.sites:
            continue
        if not parameter.is_floating_point():
            skipped[name] = f"is of {parameter.dtype}"
        elif name.rpartition(".")[0] == head:
            skipped[name] = "belongs to the head"
        elif parameter not in read:
            skipped[name] = "is not read by the model"
        else:
            found.append(name)
    return tuple(found), skipped


def freeze_norms(program: Program, values: dict[str, Tensor]) -> None:
    """Undo the pass, with values for the parameters in the model's dtype."""
    changed = set[fx.GraphModule]()
    names, readers = names_of(program), _readers(program)
    for name, dtype in program.trained.items():
        old = program.get_parameter(name)
        if old.dtype != dtype:
            for module, node in readers[old]:
                drop_cast(node)
                changed.add(module)
        _replace(program, names[old], nn.Parameter(values[name], requires_grad=False))
    program.trained.clear()
    for module in changed:
        module.recompile()


def _replace(program: Program, names: list[str], new: nn.Parameter) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        program.get_submodule(owner).register_parameter(attribute, new)


def _readers(program: Program) -> dict[nn.Parameter, list[tuple[fx.GraphModule, fx.Node]]]:
    """The nodes that read a parameter and are used, with their graphs."""
    parameters = dict(program.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, list[tuple[fx.GraphModule, fx.Node]]] = {}
    for path, module in program.graphs():
        for node in module.graph.find_nodes(op="get_attr"):
            if node.users and (parameter := parameters.get(child_path(path, node))) is not None:
                found.setdefault(parameter, []).append((module, node))
    return found
