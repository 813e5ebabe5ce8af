"""What the adapter kernels share: rows of activations, and a weight that is never trained."""

from typing import Any

from torch import Tensor

from spp_fx.errors import UsageError

WEIGHT_INPUT = 1


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
