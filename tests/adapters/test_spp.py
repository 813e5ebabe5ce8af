"""SPP's definition, and every execution of it held to that definition."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from spp_fx.adapters import SPP
from spp_fx.adapters.ops import passes, rows, spp_linear, spp_weight
from spp_fx.adapters.ops.dropout import apply_dropout
from spp_fx.errors import UsageError
from tests.adapters.layers import EXECUTIONS, OPS, SCALE, Layer, make_layer, run
from tests.effort import covering

EXACT = 1e-12  # float64, relative: a few roundings of sums of some ten terms
M, N, R = 12, 10, 3  # blocks of 4 rows
# Rows that fit into a block: one, fewer than a row block's 4, exactly one, two (uneven rest), all.
BLOCKS = {"one row": N, "less": 3 * N, "equal": 4 * N, "two and a rest": 9 * N + 3, "all": 1 << 22}


def small_blocks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Blocks of so many elements, and tiles of half as many."""
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(passes, "TILE_ELEMENTS", max(1, elements // 2))


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    small_blocks(monkeypatch, BLOCKS[request.param])


def effective(weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """W' by the plain triple loop of Eq. 4."""
    m, n = weight.shape
    height = m // alpha.shape[0]
    result = torch.empty_like(weight)
    for i in range(m):
        for c in range(n):
            result[i, c] = weight[i, c] + SCALE * weight[i, c] * beta[i, 0] * alpha[i // height, c]
    return result


def expected(layer: Layer, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The layer's output from the triple loop."""
    total = effective(layer.weight, layer.alpha, layer.beta)
    dropped = apply_dropout(layer.x, seed, dropout)
    y = layer.x @ layer.weight.t() + dropped @ (total - layer.weight).t()
    return y if layer.bias is None else y + layer.bias


def test_the_effective_weight_is_the_triple_loop_of_equation_4():
    layer = make_layer(M, N, R)
    method = SPP(rank=R, scale=SCALE)
    got = method.effective_weight(layer.weight, spp_alpha=layer.alpha, spp_beta=layer.beta)
    torch.testing.assert_close(got, effective(layer.weight, layer.alpha, layer.beta), rtol=EXACT, atol=0)


def test_rows_of_the_factors_give_rows_of_the_update():
    layer = make_layer(M, N, R)
    method = SPP(rank=R, scale=SCALE)
    factors = {"spp_alpha": layer.alpha, "spp_beta": layer.beta}
    whole = method.update(layer.weight, **factors)
    for start in range(M):
        for stop in range(start + 1, M + 1):
            part = method.update(layer.weight[start:stop], **method.rows(factors, start, stop))
            assert torch.equal(part, whole[start:stop])


@covering(
    execution=EXECUTIONS,
    rows=[(1,), (5,), (2, 3), (1, 1)],
    dropout=[0.0, 0.4],
    blocks=BLOCKS,
    indirect=["blocks"],
)
def test_every_execution_is_the_definition(execution, rows, dropout, blocks):
    for bias in (True, False):
        layer = make_layer(M, N, R, rows, bias=bias)
        seed = torch.tensor(7) if dropout else None
        got = run(execution, layer, seed, dropout)
        torch.testing.assert_close(got, expected(layer, seed, dropout), rtol=EXACT, atol=EXACT)


@covering(execution=EXECUTIONS, dropout=[0.0, 0.4], blocks=BLOCKS, indirect=["blocks"])
def test_the_gradients_of_every_execution_are_those_of_the_definition(execution, dropout, blocks):
    for bias in (True, False):
        layer = make_layer(M, N, R, (2, 3), bias=bias)
        seed = torch.tensor(7) if dropout else None
        dy = torch.randn(2, 3, M, dtype=torch.float64)
        got = torch.autograd.grad(run(execution, layer, seed, dropout), layer.leaves(), dy)
        wanted = torch.autograd.grad(expected(layer, seed, dropout), layer.leaves(), dy)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@covering(execution=OPS, dropout=[0.0, 0.4], shape=[(4, 3, 2), (6, 2, 1), (3, 4, 3), (1, 1, 1)])
def test_gradcheck(execution, shape, dropout, monkeypatch):
    small_blocks(monkeypatch, 2 * shape[1])
    layer = make_layer(*shape, (2,))
    seed = torch.tensor(7) if dropout else None

    def call(x, alpha, beta, bias):
        return OPS[execution](x, layer.weight, alpha, beta, bias, seed, SCALE, dropout)

    assert torch.autograd.gradcheck(call, layer.leaves())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_transposed_weight_and_a_strided_input_give_the_same(execution, blocks):
    layer = make_layer(M, N, R, (4,))
    strided = torch.randn(4, 2 * N, dtype=torch.float64)
    strided[:, ::2] = layer.x.detach()
    twin = Layer(
        strided[:, ::2].requires_grad_(),
        layer.weight.t().contiguous().t(),
        layer.alpha,
        layer.beta,
        layer.bias,
    )
    assert not twin.weight.is_contiguous()
    dy = torch.randn(M, 4, dtype=torch.float64).t()
    y, z = run(execution, twin), run(execution, layer)
    torch.testing.assert_close(y, z, rtol=EXACT, atol=EXACT)
    for a, b in zip(
        torch.autograd.grad(y, twin.leaves(), dy), torch.autograd.grad(z, layer.leaves(), dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_only_the_factors_may_ask_for_gradients(execution, dropout):
    """The first layer of a model with frozen embeddings has an input without gradient."""
    layer = make_layer(M, N, R, bias=False)
    wanted = torch.autograd.grad(expected(layer, torch.tensor(7), dropout).sum(), [layer.alpha, layer.beta])
    layer.x.requires_grad_(False)
    y = run(execution, layer, torch.tensor(7) if dropout else None, dropout)
    for a, b in zip(torch.autograd.grad(y.sum(), [layer.alpha, layer.beta]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_input_without_rows_gives_an_output_without_rows(execution):
    layer = make_layer(M, N, R, (0,))
    y = run(execution, layer)
    grads = torch.autograd.grad(y.sum(), layer.leaves())
    assert y.shape == (0, M)
    assert [g.abs().sum().item() for g in grads] == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_half_precision_is_near_the_float64_definition(execution, dropout, dtype):
    exact = make_layer(48, 64, 4, (9,))
    half = {name: getattr(exact, name).detach().to(dtype) for name in ("x", "weight", "bias")}
    factors = {name: (0.3 * getattr(exact, name).detach()).float() for name in ("alpha", "beta")}
    low = Layer(**half, **factors)
    exact = Layer(**{name: getattr(low, name).double() for name in ("x", "weight", "alpha", "beta", "bias")})
    for layer in (low, exact):
        for leaf in layer.leaves():
            leaf.requires_grad_()
    seed = torch.tensor(7) if dropout else None
    y, wanted = run(execution, low, seed, dropout), expected(exact, seed, dropout)
    assert y.dtype == dtype
    assert near(y, wanted)
    grads = torch.autograd.grad(y.float().square().sum(), low.leaves())
    targets = torch.autograd.grad(wanted.square().sum(), exact.leaves())
    assert all(near(g, t) for g, t in zip(grads, targets, strict=True))
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in low.leaves()]


def near(value: Tensor, exact: Tensor) -> bool:
    return bool((value.double() - exact).norm() <= 1e-2 * exact.norm())


@covering(execution=OPS, bias=[True, False], dropout=[0.0, 0.4])
def test_opcheck(execution, bias, dropout):
    layer = make_layer(4, 6, 2, (3,), bias=bias)
    seed = torch.tensor(7) if dropout else None
    arguments = (layer.x, layer.weight, layer.alpha, layer.beta, layer.bias, seed, SCALE, dropout)
    torch.library.opcheck(OPS[execution], arguments)


def test_opcheck_of_the_backwards():
    layer = make_layer(4, 6, 2, (3,))
    x, alpha, beta = (t.detach() for t in (layer.x, layer.alpha, layer.beta))
    dy = torch.randn(3, 4, dtype=torch.float64)
    shared = (dy, x, layer.weight, alpha, beta, torch.tensor(7), SCALE, 0.4)
    ops = torch.ops.spp_fx
    for backward in (ops.spp_linear_blockwise_backward.default, ops.spp_linear_fused_backward.default):
        for needs_x in (True, False):
            torch.library.opcheck(backward, (*shared, needs_x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("execution", ["blockwise", "fused"])
def test_a_kernel_keeps_only_its_inputs_for_backward(execution, dropout):
    layer = make_layer(M, N, R)
    seed = torch.tensor(7) if dropout else None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(execution, layer, seed, dropout)
    inputs = [layer.x, layer.weight, layer.alpha, layer.beta] + ([seed] if dropout else [])
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in inputs)


def test_the_definition_keeps_more_than_its_inputs():
    """What the kernels avoid; it also shows that the counting above can fail."""
    layer = make_layer(M, N, R)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run("definition", layer)
    inputs = {t.data_ptr() for t in (layer.x, layer.weight, layer.alpha, layer.beta)}
    assert any(t.data_ptr() not in inputs and t.numel() == M * N for t in kept)


def gemms(execution: str, dropout: float) -> float:
    """GEMMs of a training step, forward and backward, in units of the layer's dense one."""
    m, n, rows = 64, 32, 48
    layer = make_layer(m, n, 4, (rows,))
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as prof:
        run(execution, layer, torch.tensor(7) if dropout else None, dropout).sum().backward()
    flops = sum(e.flops for e in prof.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    return flops / (2 * m * n * rows)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 3.0), (0.4, 5.0)])
def test_a_fused_training_step_costs_three_products_and_five_with_dropout(dropout, expected, blocks):
    assert gemms("fused", dropout) == expected


MEMORY = """
import sys, torch
from spp_fx.adapters.ops import spp_fused, spp_linear
from spp_fx.adapters.ops.rows import BLOCK_ELEMENTS
torch.set_num_threads(1)
m, n, b = 4096, 4096, 8
BLOCK_ELEMENTS["cpu"] = 1 << 18
op = {"fused": spp_fused.OP, "definition": spp_linear.OP}[sys.argv[1]]
def peak():  # not getrusage: it starts at the peak of the process that started this one
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
def step(m):
    alpha, beta = torch.ones(4, n, requires_grad=True), torch.ones(m, 1, requires_grad=True)
    x = torch.ones(b, n, requires_grad=True)
    op(x, weight[:m], alpha, beta, None, None, 2.0, 0.0).sum().backward()
weight = torch.ones(m, n)
step(64)
before = peak()
step(m)
print((peak() - before) / weight.nbytes)
"""


def peak(execution: str) -> float:
    """Memory that a step adds to the process, in units of the weight's own."""
    command = [sys.executable, "-c", MEMORY, execution]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_temporaries_of_the_fused_kernel_are_blocks_of_the_weight():
    assert peak("fused") < 0.25
    assert peak("definition") > 1


@pytest.mark.parametrize("execution", ["blockwise", "fused"])
def test_a_kernel_refuses_to_train_the_weight(execution):
    layer = make_layer(M, N, R)
    layer.weight.requires_grad_()
    with pytest.raises(UsageError, match="frozen"):
        run(execution, layer)


def test_the_definition_trains_the_weight():
    layer = make_layer(M, N, R)
    layer.weight.requires_grad_()
    (got,) = torch.autograd.grad(run("definition", layer).sum(), layer.weight)
    (wanted,) = torch.autograd.grad(expected(layer).sum(), layer.weight)
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=EXACT)


def stack(experts: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    layers = [make_layer(M, N, R, seed=e) for e in range(experts)]
    weight, alpha, beta = (
        torch.stack([getattr(layer, name).detach() for layer in layers])
        for name in ("weight", "alpha", "beta")
    )
    return weight, alpha.requires_grad_(), beta.requires_grad_()


@pytest.mark.parametrize("base", [1.0, 0.0])
def test_the_weight_of_a_stack_is_the_definition_expert_by_expert(base, blocks):
    weight, alpha, beta = stack()
    got = spp_weight.OP(weight, alpha, beta, SCALE, base)
    whole = torch.stack([effective(*one) for one in zip(weight, alpha, beta, strict=True)])
    wanted = whole if base else whole - weight
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=EXACT)
    dy = torch.randn_like(weight)
    for a, b in zip(
        torch.autograd.grad(got, [alpha, beta], dy),
        torch.autograd.grad(wanted, [alpha, beta], dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_the_weight_of_a_transposed_stack_is_the_same(blocks):
    weight, alpha, beta = stack()
    twin = weight.transpose(1, 2).contiguous().transpose(1, 2)
    a, b = (spp_weight.OP(w, alpha, beta, SCALE, 1.0) for w in (weight, twin))
    assert torch.equal(a, b)
    dy = torch.randn_like(weight).transpose(1, 2).contiguous().transpose(1, 2)
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            torch.autograd.grad(a, [alpha, beta], dy), torch.autograd.grad(b, [alpha, beta], dy), strict=True
        )
    )


def test_gradcheck_and_opcheck_of_the_weight_of_a_stack(monkeypatch):
    small_blocks(monkeypatch, 20)
    weight, alpha, beta = stack()
    assert torch.autograd.gradcheck(lambda a, b: spp_weight.OP(weight, a, b, SCALE, 1.0), [alpha, beta])
    torch.library.opcheck(spp_weight.OP, (weight, alpha, beta, SCALE, 1.0))
    backward = torch.ops.spp_fx.spp_weight_backward.default
    torch.library.opcheck(backward, (weight, weight, alpha.detach(), beta.detach(), SCALE))


def test_the_weight_of_a_stack_refuses_to_train_it():
    weight, alpha, beta = stack()
    with pytest.raises(UsageError, match="frozen"):
        spp_weight.OP(weight.requires_grad_(), alpha, beta, SCALE, 1.0)


@pytest.mark.parametrize("execution", ["blockwise", "fused"])
def test_gradients_do_not_alias_the_incoming_one(execution):
    """A backward must not write into the gradient it is handed."""
    layer = make_layer(M, N, R)
    dy = torch.randn(3, M, dtype=torch.float64)
    before = dy.clone()
    torch.autograd.grad(run(execution, layer), layer.leaves(), dy)
    assert torch.equal(dy, before)


def test_zeros_of_the_weight_stay_zero_whatever_the_factors():
    layer = make_layer(M, N, R)
    total = spp_linear.update(layer.weight, 1e6 * layer.alpha, 1e6 * layer.beta, SCALE)
    assert torch.equal(total != 0, layer.weight != 0)


def test_layers_one_after_the_other_share_a_buffer_and_no_result():
    """Several shapes and dtypes in turn, inference mode first: each as if it were alone."""
    layers = [make_layer(M, N, R, seed=seed) for seed in range(3)]
    with torch.inference_mode():
        run("fused", layers[0])
    outputs = [run("fused", layer) for layer in layers]
    half = OPS["fused"](torch.ones(2, 64).half(), torch.ones(32, 64).half(), *factors(), None, None, 1.0, 0.0)
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


def factors() -> tuple[Tensor, Tensor]:
    """Of a (32, 64) weight: they double it."""
    return torch.ones(4, 64), torch.ones(32, 1)
