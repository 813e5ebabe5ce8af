"""Updates: new values for the entries that a mask keeps, so that outputs change little."""

from collections.abc import Callable

import torch
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.pruning.select import row_blocks
from spp_fx.pruning.statistics import Inputs

ITERATIONS = 20
DAMPING = 0.1
RHO = 1.0


def admm(weight: Tensor, inputs: Inputs, mask: Tensor) -> Tensor:
    """The W~ under a mask for which || (W~ - W) X || is least, nearly: 20 steps of ADMM (Boža, 2024, Algorithm 1).

    Each input is scaled to norm 1, and 0.1 added to the diagonal of the products. Rows do not depend on each other, and
    share one inverse.

    Args:
        weight: W (out, in), as it was before pruning; not written to.
        inputs: with their `hessian`.
        mask: (out, in) bool, true where it is kept.

    Returns:
        (out, in) float32, zero outside of the mask.

    Raises:
        PatternError: the products of inputs are NaN or infinite.
    """
    assert inputs.hessian is not None
    products = inputs.hessian.to(torch.float32, copy=True)
    scale = products.diagonal().sqrt() + 1e-8
    products /= scale
    products /= scale[:, None]
    diagonal = products.diagonal()
    diagonal += DAMPING * diagonal.mean()
    inverse = products.clone()
    inverse.diagonal().add_(RHO)
    factor, failed = torch.linalg.cholesky_ex(inverse)
    if int(failed):
        raise PatternError("the products of its inputs are NaN or infinite")
    torch.cholesky_inverse(factor, out=inverse)
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows, kept, target in row_blocks(weight, mask, result):
        w = rows.float() * scale
        wanted = w @ products
        dual = torch.zeros_like(w)
        for _ in range(ITERATIONS):
            sparse = (w + dual) * kept
            dual += w - sparse
            w = (wanted + RHO * (sparse - dual)) @ inverse
        target.copy_((w + dual) * kept / scale)
    return result


UPDATES: dict[str, Callable[[Tensor, Inputs, Tensor], Tensor]] = {"admm": admm}
"""By name: of a weight before pruning, its inputs with their `hessian`, and the mask that was chosen."""
