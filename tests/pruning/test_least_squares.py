"""The start by least squares: never worse than the pruned model, exact where the dense weight can be reached."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.adapters.method import METHODS, Method, initial_factor, make_method
from spp_fx.errors import UsageError
from spp_fx.passes.causal import Causal
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning import least_squares
from spp_fx.pruning.gradients import Source
from spp_fx.pruning.layerwise import InPlace
from spp_fx.pruning.least_squares import check_linear, layer_inputs, row_factor, solve_rows
from spp_fx.pruning.walk import MemoryStates
from tests.families import batch
from tests.passes.programs import sparse

SHAPE = (12, 20)
SOLVABLE = [name for name in METHODS.built_in if row_factor(METHODS[name](), (512, 512)) is not None]


def problem(seed: int, tokens: int = 50):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(SHAPE, generator=generator)
    x = torch.randn(tokens, SHAPE[1], generator=generator) * torch.rand(SHAPE[1], generator=generator)
    weight = dense * (torch.rand(SHAPE, generator=generator) < 0.5)
    return weight, dense, x


def start_of(method: Method) -> dict[str, torch.Tensor]:
    return {
        key: initial_factor(spec, key, 0, torch.device("cpu")) for key, spec in method.factors(SHAPE).items()
    }


def error(weight, dense, x) -> float:
    return float((x.double() @ (weight - dense).double().t()).square().sum())


def effective(method, weight, factors):
    return weight + method.update(weight, **factors) * (weight != 0)


@pytest.mark.parametrize("name", SOLVABLE)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 60))
def test_the_outputs_are_never_further_from_the_dense_ones(name, seed, tokens):
    """Also with fewer tokens than inputs, where the normal equations are singular."""
    method = make_method(name, rank=4)
    weight, dense, x = problem(seed, tokens)
    solved = solve_rows(method, weight, dense, x.t() @ x, start_of(method))
    after = error(effective(method, weight, solved.factors), dense, x)
    before = error(weight, dense, x)
    assert after <= before * (1 + 1e-5)
    assert solved.before == pytest.approx(before, rel=1e-3, abs=1e-3)
    assert solved.after == pytest.approx(after, rel=1e-3, abs=1e-3 * before)
    changed = method.update(weight, **solved.factors) * (weight != 0)
    assert not changed[weight == 0].any()


@pytest.mark.parametrize("name", SOLVABLE)
def test_it_is_the_least_squares_solution_of_every_row(name, monkeypatch):
    """Against numpy-style least squares on X itself, in float64; in blocks of any size."""
    method, (weight, dense, x) = make_method(name, rank=4), problem(0)
    start = start_of(method)
    key = row_factor(method, SHAPE)
    results = []
    for elements in (1, 5 * SHAPE[1], 1 << 24):
        monkeypatch.setattr(least_squares, "BLOCK_ELEMENTS", elements)
        results.append(solve_rows(method, weight, dense, x.t() @ x, start).factors[key])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-3)
    after = effective(method, weight, {**start, key: results[0]})
    first = effective(method, weight, start)
    for row in range(SHAPE[0]):
        columns = []
        for k in range(start[key].shape[1]):
            moved = start[key].clone()
            moved[row, k] += 1
            columns.append(x @ (effective(method, weight, {**start, key: moved}) - first)[row])
        basis, target = torch.stack(columns, 1).double(), (x @ (dense - first)[row]).double()
        best = torch.linalg.lstsq(basis, target[:, None]).solution
        least = float((basis @ best - target[:, None]).square().sum())
        assert error(after[row : row + 1], dense[row : row + 1], x) == pytest.approx(least, rel=1e-3)


def test_a_scaled_weight_is_found_exactly():
    method, (weight, _, x) = make_method("spp", rank=4), problem(1)
    start = {
        key: torch.ones_like(value) if "alpha" in key else value for key, value in start_of(method).items()
    }
    dense = weight * torch.linspace(0.5, 2, SHAPE[0])[:, None]
    solved = solve_rows(method, weight, dense, x.t() @ x, start)
    torch.testing.assert_close(effective(method, weight, solved.factors), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hessian", [torch.zeros(20, 20), torch.full((20, 20), 1e-30)])
def test_inputs_that_are_zero_leave_the_start(hessian):
    weight, dense, _ = problem(2)
    method = make_method("sqft", rank=4)
    solved = solve_rows(method, weight, dense, hessian, start_of(method))
    assert all(bool(value.isfinite().all()) for value in solved.factors.values())


def test_a_method_without_a_factor_for_rows_is_refused():
    assert row_factor(make_method("masked-full"), SHAPE) is None
    with pytest.raises(UsageError, match="masked-full: its update is not linear in a factor"):
        check_linear(make_method("masked-full"), SHAPE)
    for name in SOLVABLE:
        check_linear(make_method(name, rank=4), SHAPE)


def test_layers_see_what_the_ones_before_were_made():
    """The inputs that are given are those of a model whose earlier layers hold what was written to them."""
    model, program = sparse("llama")
    run_pipeline(program.eval(), [Match(), Partition(), Causal()])
    ids, source = batch(3, 12), Source(program, InPlace(), MemoryStates())
    name = "model.layers.1.self_attn.q_proj.weight"
    for each in layer_inputs(source, ids, list(program.matched), device=torch.device("cpu")):
        if each.site == name:
            found = each.inputs[0].hessian
        elif ".0." in each.site:
            each.weight.mul_(1.5)
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for row in ids:
            model.eval()(row[None])  # shares its weights with the program
    hook.remove()
    x = torch.cat(seen).flatten(0, 1)
    torch.testing.assert_close(found, 2 / 3 * x.t() @ x, rtol=1e-4, atol=1e-4)
