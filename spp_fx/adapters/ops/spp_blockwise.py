"""SPP block by block (Eq. 7): the m x n product of the factors with W is never formed."""

import torch
from torch import Tensor

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.dropout import apply_dropout
from spp_fx.adapters.ops.frozen import flatten
from spp_fx.adapters.ops.linear_op import linear_op
from spp_fx.adapters.ops.rows import dense_rows


def forward(adapted: Adapted, x: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    """`spp_linear` as Y_j = X W_j^T + s * beta_j * ((X~ * alpha_j) W_j^T) over the r row blocks j of W.

    X~ is x after dropout. Costs two GEMMs of the layer's size; temporaries are (b, n) and (b, m/r).
    """
    (m, _), height, alpha, beta, scale = (
        adapted.rows.shape,
        adapted.height,
        adapted.alpha,
        adapted.beta,
        adapted.scale,
    )
    rows = flatten(x)
    dropped = rows if seed is None or dropout == 0 else apply_dropout(rows, seed, dropout)
    y = x.new_empty(*x.shape[:-1], m)
    flat = y.view(-1, m)
    for j in range(alpha.shape[0]):
        block = slice(j * height, (j + 1) * height)
        w = adapted.rows.take(block.start, block.stop).to(x.dtype)
        branch = (dropped * alpha[j]).to(x.dtype) @ w.t()
        flat[:, block] = rows @ w.t() + scale * branch * beta[block, 0]
    if bias is not None:
        y += bias
    return y


def backward(
    grad: Tensor, adapted: Adapted, x: Tensor, seed: Tensor | None, dropout: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (an empty tensor unless needs_x), alpha and beta; three GEMMs of the layer's size."""
    height, alpha, beta, scale = adapted.height, adapted.alpha, adapted.beta, adapted.scale
    rows, dy = flatten(x), flatten(grad)
    masked = seed is not None and dropout != 0
    dropped = apply_dropout(rows, seed, dropout) if masked else rows
    dx = torch.zeros_like(rows, dtype=torch.promote_types(x.dtype, alpha.dtype))
    dbranch = torch.zeros_like(dx)
    dalpha, dbeta = torch.empty_like(alpha), torch.empty_like(beta)
    for j in range(alpha.shape[0]):
        block = slice(j * height, (j + 1) * height)
        w = adapted.rows.take(block.start, block.stop).to(x.dtype)
        inner = ((scale * dy[:, block]) * beta[block, 0]).to(x.dtype) @ w
        dalpha[j] = (dropped.to(dx.dtype) * inner).sum(0)
        branch = (dropped * alpha[j]).to(x.dtype) @ w.t()
        dbeta[block, 0] = scale * (dy[:, block].to(dx.dtype) * branch).sum(0)
        if needs_x:
            dx += dy[:, block] @ w
            dbranch += inner * alpha[j]
    if not needs_x:
        return x.new_empty(0), dalpha, dbeta
    dx += apply_dropout(dbranch, seed, dropout) if masked else dbranch
    return dx.to(x.dtype).view(x.shape), dalpha, dbeta


OP = linear_op("spp_linear_blockwise", ("weight",), dense_rows, forward, backward)
