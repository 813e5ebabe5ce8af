"""Leaving the processes that torchrun or accelerate launch started together."""

import torch.distributed as dist


def leave() -> None:
    """Wait for all processes, then end the group: one that ends while others still talk to it kills them."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
