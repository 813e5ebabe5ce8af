"""Making an op of a kernel: its schema, its fake and autograd implementations, autocast, and what it refuses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.frozen import flatten, follow_autocast, refuse_weight_gradient
from spp_fx.adapters.ops.rows import Rows

Forward = Callable[[Adapted, Tensor, Tensor | None, Tensor | None, float], Tensor]
"""`(adapted, x, bias, seed, dropout)`: `spp_linear` with the frozen weight as rows."""
Backward = Callable[[Tensor, Adapted, Tensor, Tensor | None, float, bool], tuple[Tensor, Tensor, Tensor]]
"""`(grad, adapted, x, seed, dropout, needs_x)`: gradients of x (empty unless needs_x), alpha and beta."""


def linear_op(
    name: str, storage: Sequence[str], rows_of: Callable[..., Rows], forward: Forward, backward: Backward
) -> OpOverload:
    """The op `spp_fx::NAME` that runs `forward`, keeps its inputs and runs `spp_fx::NAME_backward`.

    torch.compile, export and activation checkpointing see one node; the weight is frozen.

    Args:
        name: of the op.
        storage: names of the tensors that hold the frozen weight; they follow x in the op's arguments, and
            alpha, beta, bias, seed, scale and dropout follow them.
        rows_of: called with those tensors and the weight's shape (m, n).
        forward, backward: the kernel.
    """
    count, qualified = len(storage), f"spp_fx::{name}"
    tensors = "".join(f", Tensor {each}" for each in storage)
    bias_at = 1 + count + 2

    def adapted(storage: Sequence[Tensor], x: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Adapted:
        return Adapted(rows_of(*storage, (beta.shape[0], x.shape[-1])), alpha, beta, scale)

    def call(x: Tensor, *arguments: Any) -> Tensor:
        alpha, beta, bias, seed, scale, dropout = arguments[count:]
        return forward(adapted(arguments[:count], x, alpha, beta, scale), x, bias, seed, dropout)

    def fake(x: Tensor, *arguments: Any) -> Tensor:
        beta = arguments[count + 1]
        return x.new_empty(*x.shape[:-1], beta.shape[0])

    def call_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta, seed, scale, dropout, needs_x = arguments[count:]
        return backward(grad, adapted(arguments[:count], x, alpha, beta, scale), x, seed, dropout, needs_x)

    def fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        (alpha, beta), needs_x = arguments[count : count + 2], arguments[-1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else x.new_empty(0)
        return dx, torch.empty_like(alpha), torch.empty_like(beta)

    op = torch.library.custom_op(
        qualified,
        call,
        mutates_args=(),
        schema=f"(Tensor x{tensors}, Tensor alpha, Tensor beta, Tensor? bias, Tensor? seed, "
        "float scale, float dropout) -> Tensor",
    )
    op_backward = torch.library.custom_op(
        f"{qualified}_backward",
        call_backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor x{tensors}, Tensor alpha, Tensor beta, Tensor? seed, "
        "float scale, float dropout, bool needs_x) -> (Tensor, Tensor, Tensor)",
    )
    op.register_fake(fake)
    op_backward.register_fake(fake_backward)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, seed, ctx.scale, ctx.dropout = inputs
        refuse_weight_gradient(ctx)
        ctx.save_for_backward(*tensors, seed)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, seed = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, dalpha, dbeta = op_backward(grad, *tensors, seed, ctx.scale, ctx.dropout, needs_x)
        dbias = flatten(grad).sum(0) if ctx.needs_input_grad[bias_at] else None
        frozen = (None,) * count
        return dx if needs_x else None, *frozen, dalpha, dbeta, dbias, None, None, None

    op.register_autograd(differentiate, setup_context=keep)
    overload = getattr(torch.ops.spp_fx, name).default
    follow_autocast(qualified, overload)
    return overload
