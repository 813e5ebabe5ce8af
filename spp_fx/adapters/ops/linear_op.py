"""Making an op of a kernel: its fake and autograd implementations, autocast, and what it refuses."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from spp_fx.adapters.ops.frozen import flatten, follow_autocast, refuse_weight_gradient


class Forward(Protocol):
    """`spp_linear` computed some way; arguments and result as there."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor: ...


class Backward(Protocol):
    """Gradients of x (an empty tensor unless needs_x), alpha and beta, of the same shapes and dtypes."""

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        seed: Tensor | None,
        scale: float,
        dropout: float,
        needs_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_op(name: str, forward: Forward, backward: Backward) -> OpOverload:
    """The op `spp_fx::NAME` that runs `forward`, keeps its inputs and runs `spp_fx::NAME_backward`.

    torch.compile, export and activation checkpointing see one node; the weight is frozen.
    """
    qualified = f"spp_fx::{name}"

    @torch.library.custom_op(qualified, mutates_args=())
    def op(
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        return forward(x, weight, alpha, beta, bias, seed, scale, dropout)

    @op.register_fake
    def _(
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.custom_op(f"{qualified}_backward", mutates_args=())
    def op_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        seed: Tensor | None,
        scale: float,
        dropout: float,
        needs_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(grad, x, weight, alpha, beta, seed, scale, dropout, needs_x)

    @op_backward.register_fake
    def _(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        alpha: Tensor,
        beta: Tensor,
        seed: Tensor | None,
        scale: float,
        dropout: float,
        needs_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else x.new_empty(0)
        return dx, torch.empty_like(alpha), torch.empty_like(beta)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, alpha, beta, _, seed, ctx.scale, ctx.dropout = inputs
        refuse_weight_gradient(ctx)
        ctx.save_for_backward(x, weight, alpha, beta, seed)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, alpha, beta, seed = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, dalpha, dbeta = op_backward(grad, x, weight, alpha, beta, seed, ctx.scale, ctx.dropout, needs_x)
        dbias = flatten(grad).sum(0) if ctx.needs_input_grad[4] else None
        return dx if needs_x else None, None, dalpha, dbeta, dbias, None, None, None

    op.register_autograd(differentiate, setup_context=keep)
    overload = getattr(torch.ops.spp_fx, name).default
    follow_autocast(qualified, overload)
    return overload
