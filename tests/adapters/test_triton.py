"""The Triton kernels, compiled on a GPU and else in Triton's interpreter, held to the torch passes on the CPU."""

import pytest
import torch

from tests.adapters.adapted import LOW_RANK, SHAPES, in_torch, make, make_low_rank, ranges
from tests.effort import covering

pytest.importorskip("triton", reason="triton is not installed")
from spp_fx.adapters import gpu, low_rank

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


@covering(name=LOW_RANK, shape=SHAPES, dtype=TOLERANCE, storage=["dense", "2:4", "bitmask"], rank=[1, 3])
def test_a_low_rank_tile_and_its_pullback_are_those_of_torch(name, shape, dtype, storage, rank, monkeypatch):
    adapted = make_low_rank(make(*shape, dtype, storage), name, rank)
    here = make_low_rank(make(*shape, dtype, storage, DEVICE), name, rank)
    m, n, _ = shape
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}

    def both(run, *arguments):
        """What `run` makes of torch's expressions, and what the kernels make of it."""
        monkeypatch.setattr(low_rank, "_compiled", lambda *_: None)
        expected = run(adapted, "cpu", *arguments)
        monkeypatch.setattr(low_rank, "_compiled", lambda *_: gpu)
        return run(here, DEVICE, *arguments), expected

    def build(adapted, device, start, stop, base):
        out = torch.full((stop - start, n), 7.0, dtype=dtype, device=device)
        return adapted.build(start, stop, base, out).cpu()

    def pull_back(adapted, device, start, stop):
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        grads = {key: torch.ones_like(value) for key, value in adapted.factors.items()}
        adapted.pull_back(g, start, stop, grads)
        return {key: value.cpu() for key, value in grads.items()}

    for start, stop in [(0, m), (m - 3, m), (4, 4)]:
        for base in (0.0, 1.0):
            torch.testing.assert_close(*both(build, start, stop, base), **tolerance)
        near = tolerance if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(*both(pull_back, start, stop), **near)


def test_nothing_is_done_for_no_rows():
    adapted = make(8, 12, 2, torch.float32, "dense", DEVICE)
    out = torch.full((1, 12), 7.0, device=DEVICE)
    gpu.tile(adapted, 4, 4, 1.0, out)
    gpu.pullback(adapted, out[:0], 4, 4, {key: value.clone() for key, value in adapted.factors.items()})
    assert bool((out == 7).all())
