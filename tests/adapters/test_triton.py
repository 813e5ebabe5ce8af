"""The Triton kernels in Triton's interpreter, held to the torch passes."""

import pytest
import torch

from spp_fx.adapters.ops import passes
from tests.adapters.adapted import SHAPES, make, ranges

pytest.importorskip("triton", reason="triton is not installed")
from spp_fx.adapters.ops import triton_passes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run compiled")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("storage", ["dense", "2:4", "bitmask"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes_are_those_of_torch(shape, dtype, storage):
    adapted = make(*shape, dtype, storage)
    m, n, r = shape
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for start, stop in ranges(m, r):
        for base in (0.0, 1.0):
            expected, got = (torch.full((stop - start, n), 7.0, dtype=dtype) for _ in range(2))
            passes.build_torch(adapted, start, stop, base, expected)
            triton_passes.build(adapted, start, stop, base, got)
            torch.testing.assert_close(got, expected, **tolerance)
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(dtype)
        sums = [(torch.ones_like(adapted.alpha), torch.ones_like(adapted.beta)) for _ in range(2)]
        for reduce, (dalpha, dbeta) in zip(
            (passes.reduce_torch, triton_passes.reduce_gradient), sums, strict=True
        ):
            reduce(adapted, g, start, stop, dalpha, dbeta)
        for got, expected in zip(sums[1], sums[0], strict=True):
            torch.testing.assert_close(
                got, expected, **({"rtol": 1e-4, "atol": 1e-4} if dtype != torch.float64 else tolerance)
            )


def test_nothing_is_done_for_no_rows():
    adapted = make(8, 12, 2, torch.float32, "dense")
    out = torch.full((1, 12), 7.0)
    triton_passes.build(adapted, 4, 4, 1.0, out)
    triton_passes.reduce_gradient(adapted, out[:0], 4, 4, adapted.alpha, adapted.beta)
    assert bool((out == 7).all())
