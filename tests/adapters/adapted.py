"""Weights with factors in every storage, for the tests of compiled kernels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spp_fx.adapters.method import make_method
from spp_fx.adapters.op import AdaptedWeight
from spp_fx.adapters.rows import PACKINGS, DenseRows, Rows
from spp_fx.adapters.spp import SPP

SHAPES = [(8, 12, 2), (64, 300, 4), (40, 1024, 1), (33, 20, 33)]


LOW_RANK = ["sqft", "hira", "lors", "scale-lora", "lora-star"]


def make_low_rank(adapted: AdaptedWeight, name: str, rank: int = 3, scale: float = 1.5) -> AdaptedWeight:
    """The same weight with random factors of a method of a low-rank product, in the dtype of those it has."""
    generator = torch.Generator().manual_seed(rank)
    options = {} if name == "scale-lora" else {"scale": scale}
    method = make_method(name, rank=rank, **options)
    like = next(iter(adapted.factors.values()))
    specs = method.factors(adapted.rows.shape)
    factors = {key: torch.randn(spec.shape, generator=generator).to(like) for key, spec in specs.items()}
    return replace(adapted, method=method, factors=factors)


def make(m: int, n: int, r: int, dtype: torch.dtype, storage: str, device: str = "cpu") -> AdaptedWeight:
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
        return with_factors(DenseRows(weight), alpha, beta, 1.5)
    tensors = PACKINGS[storage].pack(weight)
    rows = PACKINGS[storage].rows(*(tensors[k] for k in PACKINGS[storage].tensors), (m, n))
    return with_factors(rows, alpha, beta, 1.5)


def with_factors(rows: Rows, alpha: Tensor, beta: Tensor, scale: float = 1.0) -> AdaptedWeight:
    return AdaptedWeight(SPP(len(alpha), scale), rows, {"spp_alpha": alpha, "spp_beta": beta})


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled kernels out."""
    monkeypatch.setattr(SPP, "kernels", lambda self, device: None)


def ranges(m: int, r: int) -> list[tuple[int, int]]:
    """All rows, the last block of alpha's, and one row within a block."""
    height = m // r
    return [(0, m), (m - height, m), (m // 2 // height * height, m // 2 // height * height + 1)]
