"""Every execution of every method is held to the method's own formula, gradients included."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spp_fx.adapters import op as op_module
from spp_fx.adapters.fold import FoldCounts, StoredFold, fold_matrix
from spp_fx.adapters.method import METHODS as REGISTRY
from spp_fx.adapters.method import Method, initial_factor, make_method
from spp_fx.adapters.op import apply_dropout, op_options, ops_of
from spp_fx.errors import UsageError
from tests.adapters.layers import (
    EXACT,
    EXECUTIONS,
    KERNELS,
    METHODS,
    SCALE,
    arguments,
    expected,
    make_layer,
    run,
)

M, N = 12, 8  # spp of rank 3: blocks of 4 rows
# Rows that fit into a row block: one, fewer than spp's 4, exactly those, two blocks (uneven rest), all.
BLOCKS = {"one row": N, "less": 3 * N, "equal": 4 * N, "two and a rest": 9 * N + 3, "all": 1 << 22}
# (shape of x without its last, probability of dropout, bias, blocks): every pair of values occurs in one of them.
CASES = [
    ((1,), 0.0, True, "one row"),
    ((2, 3), 0.4, False, "less"),
    ((5,), 0.4, True, "equal"),
    ((1, 1), 0.0, False, "two and a rest"),
    ((2, 3), 0.0, True, "all"),
]

methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
STRAIGHT_THROUGH = {"lors"}  # their gradients are by intent not those of what they compute
executions = pytest.mark.parametrize("execution", EXECUTIONS)
kernels = pytest.mark.parametrize("execution", KERNELS)
# Of the methods but spp and sqft, which share their code, each kernel once.
gradchecks = pytest.mark.parametrize(
    ("method", "execution", "dropout"),
    [
        pytest.param(
            method,
            execution,
            dropout,
            id=f"{name}-{execution}-{dropout}",
            marks=[]
            if name in ("spp", "sqft") or dropout == 0.4 * (execution == "fused")
            else [pytest.mark.nightly],
        )
        for name, method in METHODS.items()
        for execution in KERNELS
        for dropout in (0.0, 0.4)
    ],
)


def has_dropout(method: Method) -> bool:
    return "dropout" in method.parameters()


def small_blocks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Blocks of so many elements, and tiles of half as many."""
    monkeypatch.setitem(op_module.BLOCK_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(op_module, "TILE_ELEMENTS", max(1, elements // 2))


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=EXACT, atol=EXACT)


def test_every_registered_method_is_held_to_the_laws_and_documented():
    assert set(REGISTRY) == set(METHODS)
    documentation = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert all(f"| `{name}` | W" in documentation for name in {*REGISTRY} - {"grouped"})


@pytest.mark.parametrize(("rows", "dropout", "bias", "blocks"), CASES, ids=str)
@executions
@methods
def test_every_execution_is_the_formula(method, execution, rows, dropout, bias, blocks, monkeypatch):
    small_blocks(monkeypatch, BLOCKS[blocks])
    layer = make_layer(method, M, N, rows, bias=bias)
    p = dropout if has_dropout(method) else 0.0
    seed = torch.tensor(7) if p else None
    got, wanted = run(execution, layer, seed, p), expected(layer, seed, p)
    same(got, wanted)
    dy = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, layer.leaves(), dy),
        torch.autograd.grad(wanted, layer.leaves(), dy),
        strict=True,
    ):
        same(a, b)


@gradchecks
def test_gradcheck_and_opcheck(method, execution, dropout, monkeypatch):
    small_blocks(monkeypatch, 2 * N)
    layer = make_layer(method, 6, N, (2,), bias=dropout == 0)
    seed = torch.tensor(7) if dropout else None

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        named = dict(zip(layer.factors, factors, strict=True))
        return run(execution, replace(layer, x=x, factors=named), seed, dropout)

    factors = tuple(layer.factors.values())
    if method.name in STRAIGHT_THROUGH:
        factors = tuple(each.detach() for each in factors)
    assert torch.autograd.gradcheck(call, (layer.x, *factors))
    op, given = arguments(execution, layer, seed, dropout)
    torch.library.opcheck(op, given)


@methods
def test_opcheck_of_the_backwards(method):
    layer = make_layer(method, 6, N)
    factors = [value.detach() for value in layer.factors.values()]
    options, dy = op_options(method), torch.randn(3, 6, dtype=torch.float64)
    name = method.name.replace("-", "_")
    for needs_x in (True, False):
        backward = getattr(torch.ops.spp_fx, f"{name}_linear_fused_backward").default
        given = (dy, layer.x.detach(), layer.weight, *factors, torch.tensor(7), *options, 0.4, needs_x)
        torch.library.opcheck(backward, given)
    stacked = [torch.stack([each, 2 * each]) for each in (layer.weight, layer.weight, *factors)]
    backward = getattr(torch.ops.spp_fx, f"{name}_weight_backward").default
    torch.library.opcheck(backward, (*stacked, *options))


@executions
@methods
def test_a_transposed_weight_and_strided_activations_give_the_same(method, execution):
    layer = make_layer(method, M, N, (4,))
    strided = torch.zeros(4, 2 * N, dtype=torch.float64)
    strided[:, ::2] = layer.x.detach()
    twin = replace(layer, x=strided[:, ::2].requires_grad_(), weight=layer.weight.t().contiguous().t())
    dy = torch.randn(M, 4, dtype=torch.float64).t()
    y, z = run(execution, twin), run(execution, layer)
    same(y, z)
    for a, b in zip(
        torch.autograd.grad(y, twin.leaves(), dy), torch.autograd.grad(z, layer.leaves(), dy), strict=True
    ):
        same(a, b)


@executions
@methods
def test_the_input_need_not_ask_for_a_gradient(method, execution):
    """The first layer of a model with frozen embeddings has an input without gradient."""
    layer = make_layer(method, M, N, bias=False)
    wanted = torch.autograd.grad(expected(layer).sum(), list(layer.factors.values()))
    layer.x.requires_grad_(False)
    got = torch.autograd.grad(run(execution, layer).sum(), list(layer.factors.values()))
    for a, b in zip(got, wanted, strict=True):
        same(a, b)


@executions
@methods
def test_an_input_without_rows_gives_an_output_without_rows(method, execution):
    layer = make_layer(method, M, N, (0,))
    y = run(execution, layer)
    assert y.shape == (0, M)
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(y.sum(), layer.leaves()))


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.bfloat16, 0.4), (torch.float16, 0.0)], ids=str)
@executions
@methods
def test_half_precision_is_near_the_formula_in_float64(method, execution, dropout, dtype):
    layer = make_layer(method, 48, 64, (9,))
    p = dropout if has_dropout(method) else 0.0
    low = replace(
        layer,
        x=layer.x.to(dtype),
        weight=layer.weight.to(dtype),
        factors={key: (0.3 * value).float() for key, value in layer.factors.items()},
        bias=layer.bias.to(dtype),
    ).detached()
    exact = replace(
        low,
        x=low.x.double(),
        weight=low.weight.double(),
        factors={key: value.double() for key, value in low.factors.items()},
        bias=low.bias.double(),
    ).detached()
    seed = torch.tensor(7) if p else None
    y, wanted = run(execution, low, seed, p), expected(exact, seed, p)
    assert y.dtype == dtype
    assert near(y, wanted)
    grads = torch.autograd.grad(y.float().square().sum(), low.leaves())
    targets = torch.autograd.grad(wanted.square().sum(), exact.leaves())
    assert all(near(g, t) for g, t in zip(grads, targets, strict=True))
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in low.leaves()]


def near(value: Tensor, exact: Tensor) -> bool:
    return bool((value.double() - exact).norm() <= 1e-2 * exact.norm())


DENSE = [name for name, method in METHODS.items() if not method.masked]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@executions
@pytest.mark.parametrize("name", DENSE)
def test_evaluation_masks_an_update_that_is_dense_in_training(name, execution, dropout, monkeypatch):
    small_blocks(monkeypatch, 9 * N)
    layer, seed = make_layer(METHODS[name], M, N), torch.tensor(7) if dropout else None
    masked = METHODS[name].update(layer.weight, **layer.factors) * (layer.weight != 0)
    x = apply_dropout(layer.x, seed, dropout)
    wanted = layer.x @ layer.weight.t() + x @ masked.t() + layer.bias
    got = run(execution, layer, seed, dropout, training=False)
    same(got, wanted)
    assert not torch.allclose(got, run(execution, layer, seed, dropout))
    dy = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, layer.leaves(), dy) for y in (got, wanted)), strict=True):
        same(a, b)


@pytest.mark.parametrize("name", DENSE)
def test_evaluation_masks_the_dense_update_of_a_stack(name):
    method, (weight, factors) = METHODS[name], stack(METHODS[name])
    op, named = ops_of(method, (2, M, N)).weight, dict(zip(method.factors((2, M, N)), factors, strict=True))
    masked = method.update(weight, **named) * (weight != 0)
    same(op(weight, *factors, *op_options(method, False), 1.0), weight + masked)
    same(op(weight, *factors, *op_options(method, False), 0.0), masked)


@kernels
@methods
def test_a_kernel_keeps_only_its_inputs_for_backward(method, execution):
    layer = make_layer(method, M, N)
    seed = torch.tensor(7)
    op, given = arguments(execution, layer, seed, 0.4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(*given)
    inputs = [each for each in given if isinstance(each, Tensor) and each is not layer.bias]
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in inputs)


@methods
def test_a_kernel_refuses_to_train_the_weight_and_the_definition_trains_it(method):
    layer = make_layer(method, M, N)
    layer.weight.requires_grad_()
    with pytest.raises(UsageError, match="frozen"):
        run("fused", layer)
    (got,) = torch.autograd.grad(run("definition", layer).sum(), layer.weight)
    (wanted,) = torch.autograd.grad(expected(layer).sum(), layer.weight)
    same(got, wanted)


@kernels
@methods
def test_gradients_do_not_alias_the_incoming_one(method, execution):
    layer, dy = make_layer(method, M, N), torch.randn(3, M, dtype=torch.float64)
    before = dy.clone()
    torch.autograd.grad(run(execution, layer), layer.leaves(), dy)
    assert torch.equal(dy, before)


def stack(method: Method) -> tuple[Tensor, list[Tensor]]:
    layers = [make_layer(method, M, N, seed=seed) for seed in range(2)]
    factors = [torch.stack([each.factors[key].detach() for each in layers]) for key in layers[0].factors]
    return torch.stack([each.weight for each in layers]), [each.requires_grad_() for each in factors]


@pytest.mark.parametrize(
    ("base", "transposed", "blocks"),
    [(1.0, False, "one row"), (0.0, True, "less"), (1.0, True, "two and a rest"), (0.0, False, "all")],
)
@methods
def test_the_weight_of_a_stack_is_the_formula_expert_by_expert(method, base, transposed, blocks, monkeypatch):
    small_blocks(monkeypatch, BLOCKS[blocks])
    weight, factors = stack(method)
    stored = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    got = ops_of(method, (2, M, N)).weight(stored, *factors, *op_options(method), base)
    wanted = base * weight + method.update(
        weight, **dict(zip(method.factors((2, M, N)), factors, strict=True))
    )
    same(got, wanted)
    dy = torch.randn_like(weight)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2) if transposed else dy
    for a, b in zip(
        torch.autograd.grad(got, factors, dy), torch.autograd.grad(wanted, factors, dy), strict=True
    ):
        same(a, b)


@methods
def test_gradcheck_and_opcheck_of_the_weight_of_a_stack(method):
    weight, factors = stack(method)
    op, options = ops_of(method, (2, M, N)).weight, op_options(method)
    if method.name not in STRAIGHT_THROUGH:
        assert torch.autograd.gradcheck(lambda *own: op(weight, *own, *options, 1.0), factors)
    torch.library.opcheck(op, (weight, *factors, *options, 1.0))
    with pytest.raises(UsageError, match="frozen"):
        op(weight.requires_grad_(), *factors, *options, 1.0)


@methods
def test_parts_of_the_factors_give_parts_of_the_update(method):
    layer = make_layer(method, M, N)
    whole, specs = method.update(layer.weight, **layer.factors), method.factors((M, N))
    for rows in [(a, b) for a in range(M) for b in range(a + 1, M + 1)]:
        for columns in ((0, N), (0, 4), (3, 7), (5, 6)):
            own = {key: value[specs[key].index(rows, columns)] for key, value in layer.factors.items()}
            part = method.update(layer.weight[slice(*rows), slice(*columns)], **own)
            same(part, whole[slice(*rows), slice(*columns)])


@methods
def test_zeros_of_the_weight_stay_zero_whatever_the_factors(method):
    layer = make_layer(method, M, N)
    large = {key: 1e6 * value.detach() for key, value in layer.factors.items()}
    (folded,) = fold_matrix(method, layer.weight, large, "error", FoldCounts(), "site")
    assert torch.equal(folded == 0, layer.weight == 0)
    if method.masked:
        assert torch.equal(method.effective_weight(layer.weight, **large), folded)


@pytest.mark.parametrize(("first_row", "step", "transposed"), [(0, 12, False), (0, 5, False), (3, 2, True)])
@methods
def test_the_fold_is_the_formula(method, first_row, step, transposed):
    """Of a whole matrix and of a part of one, stored either way round, some rows at a time."""
    layer = make_layer(method, M, N)
    kept, update = layer.weight != 0, method.update(layer.weight, **layer.factors).detach()
    whole = torch.where(kept, layer.weight + update, 0).numpy()
    factors = {key: value.detach().numpy() for key, value in layer.factors.items()}
    fold = StoredFold(method, (M, N), factors, "F64", "error", "site", first_row)
    stored = layer.weight[first_row:].numpy()
    out, counts = np.empty_like(stored), FoldCounts()
    if transposed:
        for start in range(0, N, step):
            own = fold.columns(start, min(start + step, N))
            part = slice(start, start + step)
            counts.add(own.rows(stored[:, part], out[:, part], 0))
    else:
        for start in range(0, len(stored), step):
            counts.add(fold.rows(stored[start : start + step], out[start : start + step], start))
    np.testing.assert_allclose(out, whole[first_row:], rtol=EXACT, atol=0)
    removed = torch.where(kept, 0, update)[first_row:]
    assert (counts.vanished, counts.changed) == (0, int(kept[first_row:].sum()))
    assert (
        counts.removed
        == int(removed.count_nonzero())
        == (0 if method.masked else int((~kept[first_row:]).sum()))
    )
    share = float(removed.square().sum() / update[first_row:].square().sum())
    assert counts.removed_share == pytest.approx(share, rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@methods
def test_untrained_factors_fold_to_the_same_bits(method, dtype):
    layer, cpu = make_layer(method, M, N), torch.device("cpu")
    start = {key: initial_factor(spec, key, 0, cpu) for key, spec in method.factors((M, N)).items()}
    weight, counts = layer.weight.to(dtype), FoldCounts()
    folded = torch.cat(list(fold_matrix(method, weight, start, "keep", counts, "site")))
    assert torch.equal(folded.view(torch.uint8), weight.view(torch.uint8))
    assert counts == FoldCounts()
    same(run("fused", replace(layer, factors=start)), layer.x @ layer.weight.t() + layer.bias)


@methods
def test_all_parts_of_the_factors_learn_within_two_steps(method):
    """A row or column of a factor that started where no gradient ever reaches it would never move."""
    layer, cpu = make_layer(method, M, N), torch.device("cpu")
    specs = method.factors((M, N))
    start = {key: initial_factor(spec, key, 0, cpu).double() for key, spec in specs.items()}
    moved = start
    for _ in range(2):
        own = {key: value.clone().requires_grad_() for key, value in moved.items()}
        loss = run("fused", replace(layer, factors=own)).square().sum()
        grads = torch.autograd.grad(loss, list(own.values()))
        moved = {key: own[key].detach() - 1e-3 * grad for key, grad in zip(own, grads, strict=True)}
    for key, value in moved.items():
        change = value != start[key]
        assert change.any(-1).all(), key
        assert change.any(-2).all(), key


@methods
def test_the_options_make_the_same_method_again(method):
    assert make_method(method.name, **method.parameters()) == method
    assert all(each.metadata["help"] for each in fields(method))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@executions
def test_the_gradients_of_lors_are_the_formulas_of_its_paper(execution, blocks, dropout, monkeypatch):
    """dA = s dYᵀ (X Bᵀ) and dB = s (dY A)ᵀ X, which its published code computes without s; dX = dY W'."""
    small_blocks(monkeypatch, blocks)
    layer, seed = make_layer(METHODS["lors"], M, N, (5,)), torch.tensor(7) if dropout else None
    dy = torch.randn(5, M, dtype=torch.float64)
    dx, da, db, _ = torch.autograd.grad(run(execution, layer, seed, dropout), layer.leaves(), dy)
    x, (a, b) = apply_dropout(layer.x, seed, dropout), layer.factors.values()
    same(da, SCALE * dy.t() @ (x @ b.t()))
    same(db, SCALE * (dy @ a).t() @ x)
    masked = SCALE * (a @ b) * (layer.weight != 0)
    same(dx, dy @ layer.weight + apply_dropout(dy @ masked, seed, dropout))


def test_the_gradients_of_a_stack_of_lors_are_those_of_its_matrices():
    weight, factors = stack(METHODS["lors"])
    op = ops_of(METHODS["lors"], (2, M, N)).weight
    g = torch.randn_like(weight)
    da, db = torch.autograd.grad(op(weight, *factors, *op_options(METHODS["lors"]), 1.0), factors, g)
    a, b = (each.detach() for each in factors)
    same(da, SCALE * g @ b.mT)
    same(db, SCALE * a.mT @ g)
