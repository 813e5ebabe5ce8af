"""The definition of SPP, in plain tensor code, and as one op that decomposes into it."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from spp_fx.adapters.ops.dropout import DROPOUT


def update(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    """s * W * beta * repeat(alpha): row i of W takes row i // (m/r) of alpha. SPP, ICML 2024, Eq. 4.

    Args:
        weight: (..., m, n).
        alpha: (..., r, n), r a divisor of m.
        beta: (..., m, 1).

    Returns:
        (..., m, n) in the promoted dtype.
    """
    rows = weight.shape[-2] // alpha.shape[-2]
    return weight * (scale * beta * alpha.repeat_interleave(rows, dim=-2))


def spp_linear(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """x W^T + b + s * dropout(x) (W * beta * repeat(alpha))^T, run literally. SPP, Eq. 5.

    Args:
        x: (..., n).
        weight: (m, n), frozen.
        alpha: (r, n).
        beta: (m, 1).
        bias: (m,) or None.
        seed: (), int64, of the dropout mask; None where dropout is always 0.
        scale: s.
        dropout: probability, 0 outside of training.

    Returns:
        (..., m) in x's dtype.
    """
    delta = update(weight, alpha, beta, scale).to(weight.dtype)
    if seed is None or dropout == 0:
        return linear(x, weight + delta, bias)
    return linear(x, weight, bias) + linear(DROPOUT(x, seed, dropout), delta)


SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor alpha, Tensor beta, Tensor? bias, Tensor? seed,"
    " float scale, float dropout) -> Tensor"
)

torch.library.define("spp_fx::spp_linear", SIGNATURE)
torch.library.impl("spp_fx::spp_linear", "CompositeImplicitAutograd", spp_linear)

OP = torch.ops.spp_fx.spp_linear.default
