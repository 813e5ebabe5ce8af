"""SPP at its least cost: W' is rebuilt row block by row block, only x is kept for backward.

Without dropout a training step costs three GEMMs of the layer's size: Y = X W'^T, dX = dY W' and
G = dY^T X, from which dbeta = s rowsum(G * W * rep(alpha)) and dalpha_j = s colsum_j(beta * G * W).
With dropout the two branches see different inputs, and it costs five.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from spp_fx.adapters.ops.dropout import apply_dropout
from spp_fx.adapters.ops.frozen import flatten, follow_autocast, refuse_weight_gradient

BLOCK_ELEMENTS = 1 << 22
"""Elements of one row block: every temporary of the size of W is at most this large."""


def row_blocks(m: int, n: int, height: int) -> Iterator[tuple[int, int]]:
    """Row ranges of an (m, n) weight of at most BLOCK_ELEMENTS elements (but at least one row).

    Each is a whole number of the `height`-row blocks that share a row of alpha, or lies within one.
    """
    most = max(1, BLOCK_ELEMENTS // n)
    step = most // height * height
    if step:
        yield from ((start, min(start + step, m)) for start in range(0, m, step))
        return
    for base in range(0, m, height):
        stop = base + height
        yield from ((start, min(start + most, stop)) for start in range(base, stop, most))


def multiplier(alpha: Tensor, beta: Tensor, start: int, stop: int, scale: float) -> Tensor:
    """Rows start..stop of s * beta * repeat(alpha): (stop - start, n), a fresh tensor in the factors' dtype."""
    height = beta.shape[0] // alpha.shape[0]
    first, last = start // height, -(-stop // height)
    column = (beta[start:stop] * scale).view(last - first, -1, 1)
    return (alpha[first:last].unsqueeze(1) * column).view(stop - start, -1)


def update_rows(
    w: Tensor,
    alpha: Tensor,
    beta: Tensor,
    start: int,
    stop: int,
    scale: float,
    base: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows start..stop of base * W + s * W * beta * repeat(alpha), rounded once to dtype."""
    factor = multiplier(alpha, beta, start, stop, scale)
    factor = factor.to(torch.promote_types(factor.dtype, w.dtype))
    if base:
        factor += base
    return factor.mul_(w[start:stop]).to(dtype)


def _base_rows(
    w: Tensor,
    alpha: Tensor,
    beta: Tensor,
    start: int,
    stop: int,
    scale: float,
    masked: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What x itself is multiplied with: the whole W', or W alone where dropout parts the branches."""
    if masked:
        return w[start:stop].to(dtype)
    return update_rows(w, alpha, beta, start, stop, scale, 1.0, dtype)


@torch.library.custom_op("spp_fx::spp_linear_fused", mutates_args=())
def spp_linear_fused(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """`spp_linear` with temporaries bounded by row blocks; arguments and result as there."""
    rows = flatten(x)
    (m, n), masked = weight.shape, seed is not None and dropout != 0
    dropped = apply_dropout(rows, seed, dropout) if masked else rows
    y = x.new_empty(*x.shape[:-1], m)
    flat = y.view(-1, m)
    for start, stop in row_blocks(m, n, m // alpha.shape[0]):
        out = flat[:, start:stop]
        w = _base_rows(weight, alpha, beta, start, stop, scale, masked, x.dtype)
        if bias is None:
            torch.mm(rows, w.t(), out=out)
        else:
            torch.addmm(bias[start:stop].to(x.dtype), rows, w.t(), out=out)
        if masked:
            out += dropped @ update_rows(weight, alpha, beta, start, stop, scale, 0.0, x.dtype).t()
    return y


@spp_linear_fused.register_fake
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


@torch.library.custom_op("spp_fx::spp_linear_fused_backward", mutates_args=())
def spp_linear_fused_backward(
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
    """Gradients of x (an empty tensor unless needs_x), alpha and beta."""
    rows, dy = flatten(x), flatten(grad)
    (m, n), masked = weight.shape, seed is not None and dropout != 0
    dropped = apply_dropout(rows, seed, dropout) if masked else rows
    dx = _Sum(rows) if needs_x else None
    dbranch = _Sum(rows) if needs_x and masked else None
    dalpha, dbeta = torch.zeros_like(alpha), torch.empty_like(beta)
    height = m // alpha.shape[0]
    for start, stop in row_blocks(m, n, height):
        dy_block = dy[:, start:stop]
        if dx is not None:
            w = _base_rows(weight, alpha, beta, start, stop, scale, masked, x.dtype)
            dx.add_product(dy_block, w)
        if dbranch is not None:
            dbranch.add_product(dy_block, update_rows(weight, alpha, beta, start, stop, scale, 0.0, x.dtype))
        reduce_rows(dy_block.t() @ dropped, weight, alpha, beta, start, stop, scale, dalpha, dbeta)
    if dx is None:
        return x.new_empty(0), dalpha, dbeta
    result = dx.total()
    if dbranch is not None:
        result += apply_dropout(dbranch.total(), seed, dropout)
    return result.view(x.shape), dalpha, dbeta


def reduce_rows(
    g: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor,
    start: int,
    stop: int,
    scale: float,
    dalpha: Tensor,
    dbeta: Tensor,
) -> None:
    """Reduce rows start..stop of G = dL/dW' into dalpha (added to) and dbeta (written).

    dbeta_i = s sum_c (G W)_ic alpha_jc and dalpha_jc = s sum_{i in block j} beta_i (G W)_ic.
    """
    height = beta.shape[0] // alpha.shape[0]
    first, last = start // height, -(-stop // height)
    gw = g.to(torch.promote_types(g.dtype, alpha.dtype)).mul_(weight[start:stop])
    gw = gw.view(last - first, -1, gw.shape[1])
    dbeta[start:stop] = torch.bmm(gw, alpha[first:last].unsqueeze(2).to(gw.dtype)).view(-1, 1) * scale
    column = beta[start:stop].view(last - first, 1, -1).to(gw.dtype)
    dalpha[first:last] += torch.bmm(column, gw).squeeze(1) * scale


class _Sum:
    """A sum of matrix products; accumulated in float32 where the inputs are of half precision."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        product = a @ b
        if self.sum is None:
            self.sum = product
        else:
            if self.sum.dtype in (torch.float16, torch.bfloat16):
                self.sum = self.sum.float()
            self.sum += product

    def total(self) -> Tensor:
        if self.sum is None:
            raise AssertionError("a weight has at least one row block")
        return self.sum.to(self.like.dtype)


@spp_linear_fused_backward.register_fake
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


def _setup(ctx, inputs, output) -> None:  # pyright: ignore[reportMissingParameterType]
    x, weight, alpha, beta, _, seed, ctx.scale, ctx.dropout = inputs
    refuse_weight_gradient(ctx)
    ctx.save_for_backward(x, weight, alpha, beta, seed)


def _backward(ctx, grad: Tensor):  # pyright: ignore[reportMissingParameterType]
    x, weight, alpha, beta, seed = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    dx, dalpha, dbeta = spp_linear_fused_backward(
        grad, x, weight, alpha, beta, seed, ctx.scale, ctx.dropout, needs_x
    )
    dbias = flatten(grad).sum(0) if ctx.needs_input_grad[4] else None
    return dx if needs_x else None, None, dalpha, dbeta, dbias, None, None, None


spp_linear_fused.register_autograd(_backward, setup_context=_setup)

OP = torch.ops.spp_fx.spp_linear_fused.default
follow_autocast("spp_fx::spp_linear_fused", OP)
