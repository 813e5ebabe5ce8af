"""SPP at its least cost: W' is rebuilt row block by row block, only x is kept for backward.

Without dropout a training step costs three GEMMs of the layer's size: Y = X W'^T, dX = dY W' and
G = dY^T X, from which dbeta = s rowsum(G * W * rep(alpha)) and dalpha_j = s colsum_j(beta * G * W).
With dropout the two branches see different inputs, and it costs five.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.dropout import apply_dropout
from spp_fx.adapters.ops.frozen import flatten
from spp_fx.adapters.ops.gemm import gemm
from spp_fx.adapters.ops.linear_op import linear_op
from spp_fx.adapters.ops.passes import build, reduce_gradient
from spp_fx.adapters.ops.rows import BLOCK_ELEMENTS, dense_rows, row_blocks
from spp_fx.adapters.ops.workspace import workspace


@dataclass(frozen=True)
class Branches:
    """The activations of both branches: x itself, and x after dropout, which is x where nothing drops."""

    x: Tensor
    dropped: Tensor
    masked: bool

    @classmethod
    def of(cls, x: Tensor, seed: Tensor | None, dropout: float) -> "Branches":
        rows = flatten(x)
        masked = seed is not None and dropout != 0
        return cls(rows, apply_dropout(rows, seed, dropout) if masked else rows, masked)


def forward(adapted: Adapted, x: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    """`spp_linear` with temporaries bounded by row blocks."""
    m, _ = adapted.rows.shape
    branches = Branches.of(x, seed, dropout)
    blocks = _blocks(adapted)
    scratch = _scratch(adapted, blocks, x)
    y = x.new_empty(len(branches.x), m) if len(blocks) != 1 else None
    for start, stop in blocks:
        w = _base(adapted, start, stop, branches, scratch)
        own_bias = None if bias is None else bias[start:stop].to(x.dtype)
        out = gemm(branches.x, w.t(), own_bias, None if y is None else y[:, start:stop])
        if branches.masked:
            out += gemm(branches.dropped, build(adapted, start, stop, 0.0, scratch).t())
        y = out if y is None else y
    assert y is not None
    # Not a view: what comes next may write to it in place.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], m))


def backward(
    grad: Tensor, adapted: Adapted, x: Tensor, seed: Tensor | None, dropout: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (an empty tensor unless needs_x), alpha and beta."""
    dy = flatten(grad)
    branches = Branches.of(x, seed, dropout)
    dx, dbranch = _Sum(branches.x), _Sum(branches.x)
    dalpha, dbeta = torch.zeros_like(adapted.alpha), torch.empty_like(adapted.beta)
    blocks = _blocks(adapted)
    scratch = _scratch(adapted, blocks, x)
    for start, stop in blocks:
        dy_block = dy[:, start:stop]
        if needs_x:
            dx.add_product(dy_block, _base(adapted, start, stop, branches, scratch))
            if branches.masked:
                dbranch.add_product(dy_block, build(adapted, start, stop, 0.0, scratch))
        g = torch.mm(dy_block.t(), branches.dropped, out=scratch[: stop - start])
        reduce_gradient(adapted, g, start, stop, dalpha, dbeta)
    if not needs_x:
        return x.new_empty(0), dalpha, dbeta
    result = dx.total()
    if branches.masked:
        result += apply_dropout(dbranch.total(), seed, dropout)
    return result.view(x.shape), dalpha, dbeta


def _blocks(adapted: Adapted) -> list[tuple[int, int]]:
    (m, n), elements = adapted.rows.shape, BLOCK_ELEMENTS[adapted.alpha.device.type]
    return list(row_blocks(m, n, adapted.height, elements))


def _scratch(adapted: Adapted, blocks: list[tuple[int, int]], x: Tensor) -> Tensor:
    """One buffer for every block's W' and G, in x's dtype."""
    largest = max((stop - start for start, stop in blocks), default=0)
    return workspace("block", largest, adapted.rows.shape[1], x.dtype, x.device)


def _base(adapted: Adapted, start: int, stop: int, branches: Branches, scratch: Tensor) -> Tensor:
    """What x itself is multiplied with: the whole W', or W alone where dropout parts the branches."""
    if branches.masked:
        return adapted.rows.take(start, stop).to(scratch.dtype)
    return build(adapted, start, stop, 1.0, scratch)


class _Sum:
    """A sum of matrix products; accumulated in float32 where the inputs are of half precision."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        product = gemm(a, b)
        if self.sum is None:
            self.sum = product
            return
        if self.like.dtype in (torch.float16, torch.bfloat16):
            self.sum = self.sum.float()
        self.sum += product

    def total(self) -> Tensor:
        return self.like.new_zeros(self.like.shape) if self.sum is None else self.sum.to(self.like.dtype)


OP = linear_op("spp_linear_fused", ("weight",), dense_rows, forward, backward)
