"""The product of matrices that the fused op uses, in every type and shape it may get."""

import pytest
import torch

from spp_fx.adapters.op import gemm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def backend(request):
    with torch.backends.mkldnn.flags(enabled=request.param):
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_it_is_the_product(backend, dtype, rows):
    torch.manual_seed(0)
    a, b, bias = (torch.randn(shape).to(dtype) for shape in ((rows, 24), (24, 40), (40,)))
    wide = torch.full((rows, 100), 7.0, dtype=dtype)
    near = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    expected = (a.double() @ b.double()).to(dtype)
    for first, second in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        torch.testing.assert_close(gemm(first, second), expected, **near)
        torch.testing.assert_close(gemm(first, second, bias), expected + bias, **near)
        gemm(first, second, None, wide[:, 30:70])
        torch.testing.assert_close(wide[:, 30:70], expected, **near)
        gemm(first, second, bias, wide[:, 30:70])
        torch.testing.assert_close(wide[:, 30:70], expected + bias, **near)
    assert bool((wide[:, :30] == 7).all())
    assert bool((wide[:, 70:] == 7).all())
    column = torch.randn(rows, 1).to(dtype).expand(rows, 24)
    torch.testing.assert_close(gemm(column, b), (column.double() @ b.double()).to(dtype), **near)
