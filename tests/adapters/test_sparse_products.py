"""Products that skip the zeros of a weight, held to float64 and to the dense product's error."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spp_fx import parallel
from spp_fx.adapters import op as op_module
from spp_fx.adapters import sparse_products
from tests.adapters.layers import METHODS, expected, make_layer, run

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def made_here():
    if not all(sparse_products.takes(*[torch.ones(64, 16, dtype=dtype)] * 2) for dtype in DTYPES):
        pytest.skip("this CPU has no AVX-512 with bfloat16")


def two_of_four(m: int, n: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(m, n)
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], -0.0)
    return weight.to(dtype)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "n", "m", "stored"),
    [
        (64, 16, 16, torch.bfloat16),
        (77, 64, 272, torch.float16),  # more than one piece of rows; no whole tile of the batch
        (256, 48, 32, torch.float32),
        (1031, 32, 48, torch.bfloat16),  # several blocks of the batch, the last one short
        (2048, 16, 16, torch.float32),
    ],
    ids=str,
)
def test_the_gradient_at_kept_positions_is_as_exact_as_the_dense_product(b, n, m, stored, dtype):
    torch.manual_seed(0)
    x, dy, weight = torch.randn(b, n).to(dtype), torch.randn(b, m).to(dtype), two_of_four(m, n, stored)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    assert sparse_products.kept_gradient(x, dy, weight, out)
    exact = (dy.double().t() @ x.double()) * (weight != 0)
    dense = torch.mm(dy.t(), x) * (weight != 0)
    assert error(out, exact) <= 1.1 * error(dense, exact)
    assert not out[weight == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_threads_do_not_change_a_bit(dtype):
    torch.manual_seed(0)
    x, dy, weight = (
        torch.randn(100, 32).to(dtype),
        torch.randn(100, 528).to(dtype),
        two_of_four(528, 32, dtype),
    )
    wanted = torch.empty(528, 32, dtype=dtype)
    assert sparse_products.kept_gradient(x, dy, weight, wanted)
    wide = torch.zeros(528, 64, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        turned = (x.t().contiguous().t(), torch.cat((dy, dy), 1)[:, :528], weight.t().contiguous().t())
        assert sparse_products.kept_gradient(*turned, wide[:, 16:48])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(wide[:, 16:48], wanted)
    assert not wide[:, :16].any()
    assert not wide[:, 48:].any()


def test_threads_of_python_serve_where_openmp_is_another(monkeypatch):
    torch.manual_seed(0)
    x, dy, weight = torch.randn(64, 32), torch.randn(64, 1040), two_of_four(1040, 32, torch.float32)
    wanted, got = torch.empty(1040, 32), torch.empty(1040, 32)
    assert sparse_products.kept_gradient(x, dy, weight, wanted)
    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert sparse_products.kept_gradient(x, dy, weight, got)
    assert torch.equal(got, wanted)


def test_a_denser_weight_is_refused():
    weight = two_of_four(528, 32, torch.float32)
    weight[527, 16:25] = 1
    x, dy = torch.randn(64, 32), torch.randn(64, 528)
    assert not sparse_products.kept_gradient(x, dy, weight, torch.empty(528, 32))
    with pytest.raises(ValueError, match="do not fit"):
        sparse_products.kept_gradient(x, dy, weight[:512], torch.empty(528, 32))


def test_the_first_rows_of_an_unstructured_weight_show_that_it_is_too_dense():
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.5)
    assert not sparse_products.may_take(weight[: sparse_products.LOOKED_AT])
    x, dy = torch.randn(64, 64), torch.randn(64, 64)
    assert not sparse_products.kept_gradient(x, dy, weight, torch.empty(64, 64))


def test_what_it_is_not_made_for_is_left_to_dense_products(monkeypatch):
    x = torch.ones(64, 32)
    assert sparse_products.takes(x, x)
    assert not sparse_products.takes(x.half(), x.half())
    assert not sparse_products.takes(x.double(), x.double())
    assert not sparse_products.takes(x[:63], x[:63])
    assert not sparse_products.takes(x[:, :24], x)
    assert not sparse_products.takes(x, x[:, :24])
    monkeypatch.setattr(sparse_products, "_features", lambda: {"avx512f": True, "avx512bw": True})
    assert sparse_products.takes(x, x)
    assert not sparse_products.takes(x.bfloat16(), x.bfloat16())
    monkeypatch.setattr(sparse_products, "_features", dict)
    assert not sparse_products.takes(x, x)


@pytest.mark.parametrize("dense_rows", [0, 1], ids=["2:4", "one row too dense"])
@pytest.mark.parametrize("execution", ["fused", "bitmask"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_has_the_gradients_of_the_formula(method, execution, dense_rows, monkeypatch):
    """In several row blocks and parts of the batch; 96 rows are a multiple of 16, and of spp's rank 3."""
    monkeypatch.setitem(op_module.BLOCK_ELEMENTS, "cpu", 48 * 32)
    monkeypatch.setattr(sparse_products, "MOST_BATCH", 70)
    calls: list[bool] = []
    made = sparse_products.kept_gradient
    monkeypatch.setattr(
        sparse_products, "kept_gradient", lambda *given: calls.append(made(*given)) or calls[-1]
    )
    layer = make_layer(method, 96, 32, (5, 29), bias=False)
    layer.weight[sparse_products.LOOKED_AT :][:dense_rows] = 1.0
    low = replace(
        layer,
        x=layer.x.float(),
        weight=layer.weight.float(),
        factors={k: v.float() for k, v in layer.factors.items()},
    ).detached()
    y, wanted = run(execution, low), expected(layer)
    dy = torch.randn(wanted.shape, dtype=torch.float64)
    got = torch.autograd.grad(y, low.leaves(), dy.float())
    targets = torch.autograd.grad(wanted, layer.leaves(), dy)
    assert all(error(g, t) < 1e-5 for g, t in zip(got, targets, strict=True))
    assert (True in calls) == method.masked_gradient
    assert (False in calls) == (method.masked_gradient and dense_rows > 0)
