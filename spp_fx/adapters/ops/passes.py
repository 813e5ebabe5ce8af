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
from spp_fx.adapters.ops.workspace import workspace

TILE_ELEMENTS = 1 << 18
"""Elements of a CPU tile: 1 MiB of float32, within the cache that a core or two have to themselves."""


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
        j = slice(first // height, -(-last // height))
        gw = _product(g[first - start : last - start], rows.take(first, last), work)
        gw = gw.view(j.stop - j.start, -1, n)
        row = (alpha[j].to(work) * scale).unsqueeze(2)
        dbeta[first:last] = torch.bmm(gw, row).view(-1, 1)
        column = (beta[first:last].to(work) * scale).view(j.stop - j.start, 1, -1)
        dalpha[j] += torch.bmm(column, gw).squeeze(1)


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
    """Rows start..stop of s * beta * repeat(alpha): (stop - start, n), in the workspace."""
    height = beta.shape[0] // alpha.shape[0]
    j = slice(start // height, -(-stop // height))
    column = (beta[start:stop] * scale).to(dtype).view(j.stop - j.start, -1, 1)
    out = workspace("tile", stop - start, alpha.shape[1], dtype, alpha.device)
    torch.mul(alpha[j].to(dtype).unsqueeze(1), column, out=out.view(j.stop - j.start, -1, alpha.shape[1]))
    return out


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b in dtype, where no conversion is needed in the workspace."""
    if a.dtype == b.dtype == dtype:
        return torch.mul(a, b, out=workspace("tile", a.shape[0], a.shape[1], dtype, a.device))
    return a.to(dtype, copy=True).mul_(b)


def _work_dtype(dtype: torch.dtype, factors: torch.dtype) -> torch.dtype:
    """What the elementwise work runs in: at least float32."""
    return torch.promote_types(torch.promote_types(dtype, factors), torch.float32)


def _tiles(start: int, stop: int, n: int, height: int, device: torch.device):
    if device.type != "cpu":
        return [(start, stop)]
    return split(start, stop, n, height, TILE_ELEMENTS)
