"""What the adapter kernels share: rows of activations, and a weight that is never trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from spp_fx.errors import UsageError

WEIGHT_INPUT = 1
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def flatten(x: Tensor) -> Tensor:
    """(..., n) as (b, n)."""
    return x.reshape(-1, x.shape[-1])


def refuse_weight_gradient(ctx: Any, position: int = WEIGHT_INPUT) -> None:
    """The kernels hold the weight frozen: asking for its gradient is an error, not a silent None."""
    if ctx.needs_input_grad[position]:
        raise UsageError(
            "the weight of an adapted site is frozen: call requires_grad_(False) on it, "
            "or lower with kernel=reference, which differentiates everything"
        )


def follow_autocast(name: str, op: OpOverload) -> None:
    """Let an op take its activations (its first argument) in autocast's dtype, as linear does.

    Weight and factors stay as they are: the effective weight is built in their dtype and rounded once.

    Args:
        name: the op's full name, `spp_fx::...`.
        op: what is called with autocast off.
    """
    for device, key in AUTOCAST_KEYS.items():
        torch.library.impl(name, key, _autocast(op, device))


def _autocast(op: OpOverload, device: str) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any) -> Any:
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(x.to(dtype), *args)

    return call
