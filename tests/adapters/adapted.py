"""Adapted weights of every storage, for the tests of the passes over them."""

import torch

from spp_fx.adapters.ops.adapted import Adapted
from spp_fx.adapters.ops.packed import PACKINGS
from spp_fx.adapters.ops.rows import DenseRows

SHAPES = [(8, 12, 2), (64, 300, 4), (40, 1024, 1), (33, 20, 33)]


def make(m: int, n: int, r: int, dtype: torch.dtype, storage: str, device: str = "cpu") -> Adapted:
    generator = torch.Generator().manual_seed(m * n)
    scores = torch.rand(m, n // 4, 4, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True).view(m, n)
    weight = (torch.randn(m, n, generator=generator) * kept).to(device, dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    alpha, beta = (
        torch.randn(r, n, generator=generator).to(device, work),
        torch.randn(m, 1, generator=generator).to(device, work),
    )
    if storage == "dense":
        return Adapted(DenseRows(weight), alpha, beta, 1.5)
    tensors = PACKINGS[storage].pack(weight)
    rows = PACKINGS[storage].rows(*(tensors[k] for k in PACKINGS[storage].tensors), (m, n))
    return Adapted(rows, alpha, beta, 1.5)


def ranges(m: int, r: int) -> list[tuple[int, int]]:
    """All rows, the last block of alpha's, and one row within a block."""
    height = m // r
    return [(0, m), (m - height, m), (m // 2 // height * height, m // 2 // height * height + 1)]
