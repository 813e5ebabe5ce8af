"""The two passes over W that exact SPP needs besides its matrix products.

`build` makes rows of the effective weight, `reduce_gradient` takes G = dL/dW' to the gradients of the
factors. On the CPU both run in tiles that stay in a core's cache, in float32 for half-precision weights;
on CUDA each is one Triton kernel where Triton is at hand, and else the same expressions on whole blocks.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from spp_fx.adapters.ops.rows import Rows, split

TILE_ELEMENTS = 1 << 17
"""Elements of a CPU tile: 512 KiB of float32, within a core's own cache."""


def build(
    rows: Rows,
    alpha: Tensor,
    beta: Tensor,
    start: int,
    stop: int,
    scale: float,
    base: float,
    out: Tensor,
) -> Tensor:
    """Write rows start..stop of base * W + s * W * beta * repeat(alpha) into out, rounded once.

    Args:
        rows: the frozen weight (m, n).
        alpha: (r, n).
        beta: (m, 1).
        start, stop: a range as `row_blocks` gives it.
        scale: s.
        base: 1 for the effective weight, 0 for the update alone.
        out: at least stop - start rows of n elements, of any floating dtype.

    Returns:
        The rows of `out` that were written.
    """
    kernels = _triton(out.device)
    run = build_torch if kernels is None else kernels.build
    return run(rows, alpha, beta, start, stop, scale, base, out)


def build_torch(
    rows: Rows, alpha: Tensor, beta: Tensor, start: int, stop: int, scale: float, base: float, out: Tensor
) -> Tensor:
    """`build` in torch expressions."""
    n, height = alpha.shape[1], beta.shape[0] // alpha.shape[0]
    work = _work_dtype(rows.dtype, alpha.dtype)
    for first, last in _tiles(start, stop, n, height, out.device):
        w = rows.take(first, last)
        factor = _factor(alpha, beta, first, last, scale, work)
        target = out[first - start : last - start]
        if base and w.dtype == work == target.dtype:
            torch.addcmul(w, w, factor, value=1.0, out=target)
        else:
            target.copy_((factor.add_(base) if base else factor).mul_(w))
    return out[: stop - start]


def reduce_gradient(
    g: Tensor,
    rows: Rows,
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

    Args:
        g: (stop - start, n).
        dalpha: as alpha; the other arguments as in `build`.
        dbeta: as beta.
    """
    kernels = _triton(g.device)
    run = reduce_torch if kernels is None else kernels.reduce_gradient
    run(g, rows, alpha, beta, start, stop, scale, dalpha, dbeta)


def reduce_torch(
    g: Tensor,
    rows: Rows,
    alpha: Tensor,
    beta: Tensor,
    start: int,
    stop: int,
    scale: float,
    dalpha: Tensor,
    dbeta: Tensor,
) -> None:
    """`reduce_gradient` in torch expressions."""
    n, height = alpha.shape[1], beta.shape[0] // alpha.shape[0]
    work = _work_dtype(g.dtype, alpha.dtype)
    for first, last in _tiles(start, stop, n, height, g.device):
        gw = g[first - start : last - start].to(work, copy=True).mul_(rows.take(first, last))
        j = slice(first // height, -(-last // height))
        gw = gw.view(j.stop - j.start, -1, n)
        factor = alpha[j].unsqueeze(2).to(work)
        dbeta[first:last] = torch.bmm(gw, factor).view(-1, 1) * scale
        column = beta[first:last].view(j.stop - j.start, 1, -1).to(work)
        dalpha[j] += torch.bmm(column, gw).squeeze(1) * scale


def _triton(device: torch.device) -> ModuleType | None:
    return _triton_passes() if device.type == "cuda" else None


@cache
def _triton_passes() -> ModuleType | None:
    try:
        from spp_fx.adapters.ops import triton_passes
    except ImportError:
        return None
    return triton_passes


def _factor(alpha: Tensor, beta: Tensor, start: int, stop: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of s * beta * repeat(alpha): (stop - start, n), a fresh tensor."""
    height = beta.shape[0] // alpha.shape[0]
    j = slice(start // height, -(-stop // height))
    column = (beta[start:stop] * scale).to(dtype).view(j.stop - j.start, -1, 1)
    return (alpha[j].to(dtype).unsqueeze(1) * column).view(stop - start, -1)


def _work_dtype(dtype: torch.dtype, factors: torch.dtype) -> torch.dtype:
    """What the elementwise work runs in: at least float32."""
    return torch.promote_types(torch.promote_types(dtype, factors), torch.float32)


def _tiles(start: int, stop: int, n: int, height: int, device: torch.device):
    if device.type != "cpu":
        return [(start, stop)]
    return split(start, stop, n, height, TILE_ELEMENTS)
