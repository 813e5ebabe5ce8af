"""Other ways to train a sparse layer, written after their papers, as plain as their authors' own code.

Each takes x (b, n), a frozen weight (m, n) and two trainable factors, and returns x W'^T.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


class LoRS(torch.autograd.Function):
    """LoRS: W' = W + s (A B) * (W != 0), recomputed in backward; dA and dB without the mask (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return x @ masked_sum(weight, a, b, scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dx = grad @ masked_sum(weight, a, b, ctx.scale)
        da = ctx.scale * (grad.t() @ (x @ b.to(x.dtype).t()))
        db = ctx.scale * ((grad @ a.to(x.dtype)).t() @ x)
        return dx, None, da.to(a.dtype), db.to(b.dtype), None


def masked_sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s (A B) * (W != 0), in the weight's dtype."""
    update = (a @ b).to(weight.dtype)
    return weight + scale * update * (weight != 0)


def lors(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Factors a (m, r) and b (r, n)."""
    return LoRS.apply(x, weight, a, b, scale)


def sqft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """SQFT: the same effective weight, differentiated by autograd, which keeps what it needs."""
    return linear(x, masked_sum(weight, a, b, scale))


def sqft_checkpoint(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """SQFT that keeps only x and runs its forward again in backward."""
    return checkpoint(sqft, x, weight, a, b, scale, use_reentrant=False)


def hira(x: Tensor, weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """HiRA: W * (1 + s B A), differentiated by autograd; factors b (m, r) and a (r, n)."""
    return linear(x, weight + scale * (weight * (b @ a).to(weight.dtype)))


def spp_literal(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    """SPP's Eq. 5 as its authors run it: a second product with W * beta * repeat(alpha)."""
    rows = weight.shape[0] // alpha.shape[0]
    update = (weight * (beta * alpha.repeat_interleave(rows, dim=0))).to(weight.dtype)
    return linear(x, weight) + scale * linear(x, update)


def spp_literal_checkpoint(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    """The literal form with activation checkpointing, as its authors train it."""
    return checkpoint(spp_literal, x, weight, alpha, beta, scale, use_reentrant=False)
