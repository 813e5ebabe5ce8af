"""Joining and leaving the processes that torchrun or accelerate launch started together."""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from spp_fx.errors import UsageError

OTHERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def join(*, shards: bool) -> None:
    """Join the group of processes, if this is one of several.

    Args:
        shards: whether weights are to be split over the group.

    Raises:
        UsageError: this is a single process, or accelerate is configured to shard models itself.
    """
    for variable, name in OTHERS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate is configured for {name}, which would split the factors from their weights; "
                "configure it for plain multi-GPU (or use torchrun) and give --shard world or node"
            )
    # Loading takes minutes, in some processes longer than in others.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=30))
    if shards and state.num_processes == 1:
        raise UsageError(
            "--shard splits weights over several processes, but this is a single one; "
            "start with torchrun --nproc-per-node N -m spp_fx train ..."
        )


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of tensors, of which each may be split over processes."""
    parts = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    return sum(part.nbytes for part in parts)


def leave() -> None:
    """Wait for all processes, then end the group: a process that ends earlier makes the others fail."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
