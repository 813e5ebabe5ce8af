"""The Triton kernels, compiled on a GPU and else in Triton's interpreter, held to the torch passes on the CPU."""

import pytest
import torch

from tests.adapters.adapted import SHAPES, in_torch, make, ranges
from tests.effort import covering

pytest.importorskip("triton", reason="triton is not installed")
from spp_fx.adapters import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@covering(shape=SHAPES, dtype=TOLERANCE, storage=["dense", "2:4", "bitmask"])
def test_tile_and_pullback_are_those_of_torch(shape, dtype, storage, monkeypatch):
    in_torch(monkeypatch)
    adapted, here = make(*shape, dtype, storage), make(*shape, dtype, storage, DEVICE)
    m, n, r = shape
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for start, stop in ranges(m, r):
        for base in (0.0, 1.0):
            expected, got = (torch.full((stop - start, n), 7.0, dtype=dtype) for _ in range(2))
            adapted.build(start, stop, base, expected)
            got = got.to(DEVICE)
            gpu.tile(here, start, stop, base, got)
            torch.testing.assert_close(got.cpu(), expected, **tolerance)
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = {key: torch.ones_like(value) for key, value in adapted.factors.items()}
        got = {key: torch.ones_like(value) for key, value in here.factors.items()}
        adapted.pull_back(g, start, stop, expected)
        gpu.pullback(here, g.to(DEVICE), start, stop, got)
        near = tolerance if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close({key: value.cpu() for key, value in got.items()}, expected, **near)


def test_nothing_is_done_for_no_rows():
    adapted = make(8, 12, 2, torch.float32, "dense", DEVICE)
    out = torch.full((1, 12), 7.0, device=DEVICE)
    gpu.tile(adapted, 4, 4, 1.0, out)
    gpu.pullback(adapted, out[:0], 4, 4, {key: value.clone() for key, value in adapted.factors.items()})
    assert bool((out == 7).all())
