"""The Triton kernels, compiled on a GPU and else in Triton's interpreter, held to the torch passes on the CPU."""

import pytest
import torch

from spp_fx.adapters.ops import passes
from tests.adapters.adapted import SHAPES, make, ranges
from tests.effort import covering

pytest.importorskip("triton", reason="triton is not installed")
from spp_fx.adapters.ops import triton_passes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@covering(shape=SHAPES, dtype=TOLERANCE, storage=["dense", "2:4", "bitmask"])
def test_both_passes_are_those_of_torch(shape, dtype, storage):
    adapted, here = make(*shape, dtype, storage), make(*shape, dtype, storage, DEVICE)
    m, n, r = shape
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for start, stop in ranges(m, r):
        for base in (0.0, 1.0):
            expected, got = (torch.full((stop - start, n), 7.0, dtype=dtype) for _ in range(2))
            passes.build_torch(adapted, start, stop, base, expected)
            got = triton_passes.build(here, start, stop, base, got.to(DEVICE))
            torch.testing.assert_close(got.cpu(), expected, **tolerance)
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(dtype)
        expected = torch.ones_like(adapted.alpha), torch.ones_like(adapted.beta)
        got = torch.ones_like(here.alpha), torch.ones_like(here.beta)
        passes.reduce_torch(adapted, g, start, stop, *expected)
        triton_passes.reduce_gradient(here, g.to(DEVICE), start, stop, *got)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(
                ours.cpu(), theirs, **({"rtol": 1e-4, "atol": 1e-4} if dtype != torch.float64 else tolerance)
            )


def test_nothing_is_done_for_no_rows():
    adapted = make(8, 12, 2, torch.float32, "dense", DEVICE)
    out = torch.full((1, 12), 7.0, device=DEVICE)
    triton_passes.build(adapted, 4, 4, 1.0, out)
    triton_passes.reduce_gradient(adapted, out[:0], 4, 4, adapted.alpha, adapted.beta)
    assert bool((out == 7).all())
