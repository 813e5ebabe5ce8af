"""Dense matrix products: torch's own, or oneDNN's where that is the faster."""

from functools import cache

import torch
from torch import Tensor


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (p, q) times b (q, r), plus bias (r,), in a's dtype.

    In float32 on a CPU torch calls its BLAS; the oneDNN that it brings as well, and calls for half precision,
    is some tenth to fifth faster for X W^T and dY W (AMD Zen 4). Same precision, another order of sums.

    Args:
        out: where to write (p, r); a fresh tensor if None.
    """
    plain = a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.enabled
    onednn = _onednn_linear() if plain else None
    if onednn is not None and a.numel() and b.numel():
        result = onednn(a, b.t(), bias, "none", [], "")
        return result if out is None else out.copy_(result)
    if bias is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    return torch.addmm(bias, a, b) if out is None else torch.addmm(bias, a, b, out=out)


@cache
def _onednn_linear():  # pyright: ignore[reportUnknownParameterType] - ops have no types
    """oneDNN's linear on plain tensors, or None in a torch that was built without it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
