"""shard: each process holds a part of the frozen weights and all trained ones (FSDP2, unit by unit)."""

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program, Use
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import pack_site
from spp_fx.version import release

SPLITS_INTEGERS = (2, 12)
"""The first torch whose FSDP2 takes parameters of integers (pytorch/pytorch issue 177844)."""
Over = Literal["world", "node"]
"""The processes that share the weights: all of them, or those of a node."""


@register("shard")
@dataclass(frozen=True)
class Shard(Pass):
    """Split frozen weights between processes; a unit's are gathered while it runs, and freed after it.

    Factors stay whole in every process: they are a thousandth of the model, and DistributedDataParallel
    sums their gradients. Besides these, only gathered weights are sent: nothing else has a gradient.
    Weights go to the process's device one unit at a time: a process never holds more than its part and a unit.

    Args:
        over: `world`, or `node`: every node holds all parts, and gathers without leaving it.
        storage: `dense`, or `packed`: adapted sites are packed first, unit by unit, and gathered packed.
    """

    name: ClassVar[str]
    over: Over = "world"
    storage: Literal["dense", "packed"] = "dense"

    def requires(self, program: Program) -> None:
        if self.storage == "packed" and release(torch.__version__) < SPLITS_INTEGERS:
            raise PreconditionError(
                f"shard: FSDP of torch {torch.__version__} cannot split packed weights, which hold integers; use "
                "torch 2.12 or later, or train without --packed"
            )
        if not program.units:
            raise PreconditionError("shard: the program has no units; run partition first")
        if not (dist.is_available() and dist.is_initialized()):
            raise PreconditionError("shard: there is no group of processes; start with torchrun")
        if isinstance(program, FSDPModule):
            raise PreconditionError("shard: the program is sharded already")
        _refuse_shared(program)

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        program.again = None  # what is split cannot be shared with another trace
        device = _own_device()
        mesh = _mesh(self.over, device.type)
        trained = {p for p in program.parameters() if p.requires_grad}
        program.move_constants(program.device, device)
        adapters = program.uses(ADAPTER) if self.storage == "packed" else {}
        for path in program.units:
            inside = {name: uses for name, uses in adapters.items() if program.sites[name].layer == path}
            _pack(program, inside, device, report)
            fully_shard(program.get_submodule(path), mesh=mesh, ignored_params=trained)
            report.changed[path] = f"split between {mesh.size()} processes"
        done = program.packings.keys() | report.skipped.keys()
        _pack(program, {n: uses for n, uses in adapters.items() if n not in done}, device, report)
        for parameter in trained:
            parameter.data = parameter.data.to(device)
        fully_shard(program, mesh=mesh, ignored_params=trained)
        # The Trainer wraps the program in DistributedDataParallel, which must see the factors only.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            program, [name for name, p in program.named_parameters() if not p.requires_grad]
        )
        return report

    def ensures(self, program: Program) -> None:
        for name, parameter in program.named_parameters():
            if isinstance(parameter, DTensor) == parameter.requires_grad:
                what = "trained, but split" if parameter.requires_grad else "frozen, but whole"
                raise PostconditionError(f"shard: {name} is {what}")


def _own_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _mesh(over: Over, device_type: str) -> DeviceMesh:
    world = dist.get_world_size()
    here = _processes_here() if over == "node" else world
    names = ("nodes", "processes")
    return init_device_mesh(device_type, (world // here, here), mesh_dim_names=names)["processes"]


def _processes_here() -> int:
    """Processes of this node; every node must have as many."""
    # Raised after the gather, not before: the other processes would wait for this one.
    everywhere: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everywhere, int(os.environ.get("LOCAL_WORLD_SIZE", "0")))
    here, *others = sorted(set(everywhere))
    if here == 0:
        raise UsageError(
            "shard: over=node needs LOCAL_WORLD_SIZE, which torchrun and accelerate launch set; or use over=world"
        )
    if others or len(everywhere) % here:
        raise UsageError(
            f"shard: over=node needs as many processes on every node, got {[here, *others]}; use over=world"
        )
    return here


def _refuse_shared(program: Program) -> None:
    """FSDP gathers a parameter with one unit; one that two of them use cannot be split."""
    owner: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in program.named_parameters(remove_duplicate=False):
        unit = next((path for path in program.units if name.startswith(f"{path}.")), "")
        first_unit, first_name = owner.setdefault(parameter, (unit, name))
        if unit != first_unit and not parameter.requires_grad:
            raise PreconditionError(
                f"shard: {name} and {first_name} are one weight in two units, which cannot be split; "
                "train without sharding"
            )


def _pack(program: Program, adapters: dict[str, list[Use]], device: torch.device, report: PassReport) -> None:
    for name, uses in adapters.items():
        packing, reason = pack_site(program, name, uses, device)
        if packing is None:
            report.skipped[name] = str(reason)
