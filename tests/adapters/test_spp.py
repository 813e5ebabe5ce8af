"""SPP's formula, and what its own kernels promise beyond the laws of every method."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from spp_fx.adapters.op import BLOCK_ELEMENTS, ops_of
from spp_fx.adapters.spp import SPP
from tests.adapters.layers import EXACT, Layer, arguments, expected, make_layer, run
from tests.memory import peak

M, N, R, SCALE = 12, 10, 3, 1.5
METHOD = SPP(rank=R, scale=SCALE)


def test_the_effective_weight_is_the_triple_loop_of_equation_4():
    layer = make_layer(METHOD, M, N)
    weight, (alpha, beta) = layer.weight, layer.factors.values()
    wanted = torch.empty_like(weight)
    for i in range(M):
        for c in range(N):
            wanted[i, c] = weight[i, c] + SCALE * weight[i, c] * beta[i, 0] * alpha[i // (M // R), c]
    got = METHOD.effective_weight(weight, **layer.factors)
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=0)


def test_the_definition_keeps_more_than_its_inputs():
    """What the kernels avoid."""
    layer = make_layer(METHOD, M, N)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run("definition", layer)
    inputs = {t.data_ptr() for t in (layer.x, layer.weight, *layer.factors.values())}
    assert any(t.data_ptr() not in inputs and t.numel() == M * N for t in kept)


@pytest.mark.parametrize(("dropout", "products"), [(0.0, 3.0), (0.4, 5.0)])
def test_a_fused_training_step_costs_three_products_and_five_with_dropout(dropout, products):
    """In units of the layer's dense one, forward and backward."""
    m, n, rows = 64, 32, 48
    layer = make_layer(SPP(rank=4), m, n, (rows,))
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as prof:
        run("fused", layer, torch.tensor(7) if dropout else None, dropout).sum().backward()
    flops = sum(e.flops for e in prof.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    assert flops / (2 * m * n * rows) == products


@pytest.mark.parametrize(("execution", "blocks"), [("fused", True), ("linear", False)])
def test_the_temporaries_of_the_fused_kernel_are_blocks_of_the_weight(execution, blocks, monkeypatch):
    m, n, b = 4096, 4096, 8
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 1 << 18)
    op, weight = getattr(ops_of(SPP(rank=4), (m, n)), execution), torch.ones(m, n)

    def step(m: int) -> None:
        alpha, beta = torch.ones(4, n, requires_grad=True), torch.ones(m, 1, requires_grad=True)
        x = torch.ones(b, n, requires_grad=True)
        op(x, weight[:m], alpha, beta, None, None, 4, 2.0, 0.0).sum().backward()

    step(64)
    taken = peak(lambda: step(m)) / weight.nbytes
    assert taken < 0.25 if blocks else taken > 1


def test_layers_one_after_the_other_share_a_buffer_and_no_result():
    """Several shapes and dtypes in turn, inference mode first: each as if it were alone."""
    layers = [make_layer(METHOD, M, N, seed=seed) for seed in range(3)]
    with torch.inference_mode():
        run("fused", layers[0])
    outputs = [run("fused", layer) for layer in layers]
    doubled = {"spp_alpha": torch.ones(4, 64), "spp_beta": torch.ones(32, 1)}
    low = Layer(SPP(4, 1.0), torch.ones(2, 64).half(), torch.ones(32, 64).half(), doubled, None)
    op, given = arguments("fused", low)
    half = op(*given)
    for layer, output in zip(layers, outputs, strict=True):
        torch.testing.assert_close(output, expected(layer), rtol=EXACT, atol=EXACT)
    gradients = [
        torch.autograd.grad(y.sum(), layer.leaves()) for layer, y in zip(layers, outputs, strict=True)
    ]
    for layer, found in zip(layers, gradients, strict=True):
        alone = torch.autograd.grad(run("definition", layer).sum(), layer.leaves())
        for got, want in zip(found, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    assert torch.equal(half, torch.full((2, 32), 128.0).half())
