"""partition: one unit per layer, and checkpoint: units that recompute their activations in backward."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from spp_fx.errors import PostconditionError, PreconditionError
from spp_fx.graph.names import in_model
from spp_fx.graph.program import Program, Use, opaque
from spp_fx.graph.rewrite import replace_by_call
from spp_fx.passes.base import Pass, PassReport, register


@register("partition")
@dataclass(frozen=True)
class Partition(Pass):
    """Name one unit per layer: what is sharded, checkpointed or moved as a whole.

    A unit is the graph module that holds all sites of one layer; a layer that is called several times may be in the
    tree several times, as name, name@1, ..., of which the first is the unit. Layers are identified by their paths, so
    a model may have several stacks of them. The report lists units, not sites.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:
        if not program.sites:
            raise PreconditionError("partition: the program has no sites; run canonicalize first")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        layers = {site.layer for site in program.sites.values() if site.layer is not None}
        program.units = sorted(layers, key=_in_order)
        for path in program.units:
            module = program.get_submodule(path)
            if not isinstance(module, fx.GraphModule):
                raise PostconditionError(f"partition: {path} has no graph of its own")
            size = sum(p.numel() for p in module.parameters())
            report.changed[path] = f"{size:,} parameters"
        return report

    def ensures(self, program: Program) -> None:
        if not program.units:
            raise PostconditionError("partition: no site lies in a layer, so there is no unit")
        if uncalled := [path for path in program.units if path not in _calls(program)]:
            raise PostconditionError(f"partition: {uncalled[0]} is not called")


@register("checkpoint")
@dataclass(frozen=True)
class Checkpoint(Pass):
    """Let each unit keep only its inputs while training, and run again in backward.

    Gradients are the same to the bit, dropout included; a step costs one more forward.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:
        if not program.units:
            raise PreconditionError("checkpoint: the program has no units; run partition first")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        calls = _calls(program)
        for path in program.units:
            for use in calls[path]:
                _checkpoint(use.node)
            report.changed[path] = "runs again in backward"
        for module in {use.module for path in program.units for use in calls[path]}:
            module.recompile()
        return report


def _calls(program: Program) -> dict[str, list[Use]]:
    """The calls of each module, whichever of its copies in the tree they call."""
    found: dict[str, list[Use]] = {}
    for path, uses in program.calls().items():
        found.setdefault(in_model(path), []).extend(uses)
    return found


@opaque
def run_checkpointed(module: torch.nn.Module, *args: Any) -> Any:
    """A unit's output; while training, with nothing kept but its inputs."""
    if module.training and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def _checkpoint(node: fx.Node) -> None:
    if node.op != "call_module":
        raise PreconditionError(f"checkpoint: {node.target} is checkpointed already")
    with node.graph.inserting_before(node):
        module = node.graph.get_attr(str(node.target))
    replace_by_call(node, run_checkpointed, module, *node.args, *node.kwargs.values())


def _in_order(layer: str) -> list[tuple[int, str]]:
    """A key that sorts paths by their numbers: `layers.9` before `layers.10`."""
    return [(int(part) if part.isdigit() else -1, part) for part in layer.split(".")]
