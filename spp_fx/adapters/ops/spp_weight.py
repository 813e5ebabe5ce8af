"""The effective weight of a stack of experts as one op, for contractions that are not a plain linear."""

import torch
from torch import Tensor

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.frozen import refuse_weight_gradient
from spp_fx.adapters.ops.passes import build, reduce_gradient
from spp_fx.adapters.ops.rows import DenseRows


@torch.library.custom_op("spp_fx::spp_weight", mutates_args=())
def spp_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, base: float) -> Tensor:
    """base * W + s * W * beta * repeat(alpha), expert by expert, in tiles.

    Args:
        weight: (experts, m, n), frozen.
        alpha: (experts, r, n).
        beta: (experts, m, 1).
        scale: s.
        base: 1 for the effective weight, 0 for the update alone.

    Returns:
        (experts, m, n) in weight's dtype.
    """
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for w, a, b, o in zip(weight, alpha, beta, out, strict=True):
        build(Adapted(DenseRows(w), a, b, scale), 0, w.shape[0], base, o)
    return out


@spp_weight.register_fake
def _(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, base: float) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@torch.library.custom_op("spp_fx::spp_weight_backward", mutates_args=())
def spp_weight_backward(
    grad: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of alpha and beta."""
    dalpha, dbeta = torch.zeros_like(alpha), torch.empty_like(beta)
    for w, g, a, b, da, db in zip(weight, grad, alpha, beta, dalpha, dbeta, strict=True):
        reduce_gradient(Adapted(DenseRows(w), a, b, scale), g, 0, w.shape[0], da, db)
    return dalpha, dbeta


@spp_weight_backward.register_fake
def _(grad: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha), torch.empty_like(beta)


def _setup(ctx, inputs, output) -> None:  # pyright: ignore[reportMissingParameterType]
    weight, alpha, beta, ctx.scale, _ = inputs
    refuse_weight_gradient(ctx, position=0)
    ctx.save_for_backward(weight, alpha, beta)


def _backward(ctx, grad: Tensor):  # pyright: ignore[reportMissingParameterType]
    weight, alpha, beta = ctx.saved_tensors
    dalpha, dbeta = spp_weight_backward(grad, weight, alpha, beta, ctx.scale)
    return None, dalpha, dbeta, None, None


spp_weight.register_autograd(_backward, setup_context=_setup)

OP = torch.ops.spp_fx.spp_weight.default
