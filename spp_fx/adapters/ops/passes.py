"""The two passes over W that exact SPP needs besides its matrix products.

`build` makes rows of the effective weight, `reduce_gradient` takes G = dL/dW' to the gradients of the
factors, both at least in float32. On CUDA each is one Triton kernel, for bfloat16 on the CPU one compiled
loop; where Triton or numba are not at hand, and for other types on the CPU, torch's expressions do it, there
in tiles that stay in a core's cache.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.optional import optional
from spp_fx.adapters.ops.rows import split
from spp_fx.adapters.ops.workspace import workspace

TILE_ELEMENTS = 1 << 18
"""Elements of a CPU tile: 1 MiB of float32, within the cache that a core or two have to themselves.

`reduce_gradient` reads a tile of its products twice; `build`, which reads once, takes tiles of twice the size.
"""


def build(adapted: Adapted, start: int, stop: int, base: float, out: Tensor) -> Tensor:
    """Write rows start..stop of base * W + s * W * beta * repeat(alpha) into out, rounded once.

    Args:
        start, stop: a range as `row_blocks` gives it.
        base: 1 for the effective weight, 0 for the update alone.
        out: at least stop - start rows of n elements, of any floating dtype.

    Returns:
        The rows of `out` that were written.
    """
    kernels = _kernels(adapted, out)
    run = build_torch if kernels is None else kernels.build
    return run(adapted, start, stop, base, out)


def build_torch(adapted: Adapted, start: int, stop: int, base: float, out: Tensor) -> Tensor:
    """`build` in torch expressions."""
    work = _work_dtype(adapted.rows.dtype, adapted.alpha.dtype)
    for first, last in _tiles(adapted, start, stop, 2 * TILE_ELEMENTS):
        w = adapted.rows.take(first, last).to(work)
        factor = _factor(adapted, first, last, work)
        target = out[first - start : last - start]
        result = target if target.dtype == work else factor
        if base:
            torch.addcmul(w, w, factor, value=1.0, out=result)
        else:
            torch.mul(w, factor, out=result)
        if result is factor:
            target.copy_(factor)
    return out[: stop - start]


def reduce_gradient(
    adapted: Adapted, g: Tensor, start: int, stop: int, dalpha: Tensor, dbeta: Tensor
) -> None:
    """Reduce rows start..stop of G = dL/dW' into dalpha (added to) and dbeta (written).

    dbeta_i = s sum_c (G W)_ic alpha_jc and dalpha_jc = s sum_{i in block j} beta_i (G W)_ic.

    Args:
        g: (stop - start, n).
        start, stop: a range as `row_blocks` gives it.
        dalpha, dbeta: as alpha and beta.
    """
    kernels = _kernels(adapted, g)
    run = reduce_torch if kernels is None else kernels.reduce_gradient
    run(adapted, g, start, stop, dalpha, dbeta)


def reduce_torch(adapted: Adapted, g: Tensor, start: int, stop: int, dalpha: Tensor, dbeta: Tensor) -> None:
    """`reduce_gradient` in torch expressions."""
    alpha, beta, scale = adapted.alpha, adapted.beta, adapted.scale
    work = _work_dtype(g.dtype, alpha.dtype)
    for first, last in _tiles(adapted, start, stop, TILE_ELEMENTS):
        j = _shared(adapted, first, last)
        gw = _product(g[first - start : last - start], adapted.rows.take(first, last), work)
        gw = gw.view(j.stop - j.start, -1, alpha.shape[1])
        row = (alpha[j].to(work) * scale).unsqueeze(2)
        dbeta[first:last] = torch.bmm(gw, row).view(-1, 1)
        column = (beta[first:last].to(work) * scale).view(j.stop - j.start, 1, -1)
        dalpha[j] += torch.bmm(column, gw).squeeze(1)


def _kernels(adapted: Adapted, other: Tensor) -> ModuleType | None:
    """The compiled passes for these types and this device, if there are any."""
    if other.device.type == "cuda":
        return optional("triton_passes")
    compiled = optional("numba_passes") if other.device.type == "cpu" else None
    return compiled if compiled is not None and compiled.takes(adapted, other.dtype) else None


def _shared(adapted: Adapted, start: int, stop: int) -> slice:
    """The rows of alpha that rows start..stop of W share."""
    return slice(start // adapted.height, -(-stop // adapted.height))


def _factor(adapted: Adapted, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of s * beta * repeat(alpha): (stop - start, n), in the workspace."""
    j = _shared(adapted, start, stop)
    row = adapted.alpha[j].to(dtype).unsqueeze(1)
    column = (adapted.beta[start:stop] * adapted.scale).to(dtype).view(j.stop - j.start, -1, 1)
    out = workspace("tile", stop - start, row.shape[2], dtype, row.device)
    torch.mul(row, column, out=out.view(j.stop - j.start, -1, row.shape[2]))
    return out


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b in dtype, where no conversion is needed in the workspace."""
    if a.dtype == b.dtype == dtype:
        return torch.mul(a, b, out=workspace("tile", a.shape[0], a.shape[1], dtype, a.device))
    return a.to(dtype, copy=True).mul_(b)


def _work_dtype(dtype: torch.dtype, factors: torch.dtype) -> torch.dtype:
    """What the elementwise work runs in: at least float32."""
    return torch.promote_types(torch.promote_types(dtype, factors), torch.float32)


def _tiles(adapted: Adapted, start: int, stop: int, elements: int) -> Iterable[tuple[int, int]]:
    if adapted.alpha.device.type != "cpu":
        return [(start, stop)]
    return split(start, stop, adapted.alpha.shape[1], adapted.height, elements)
