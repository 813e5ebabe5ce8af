"""The gradient start of each method: it keeps the weight, and its first step gains more than the default's."""

import pytest
import torch

from spp_fx.adapters.directions import at_norm_of, right_vectors
from spp_fx.adapters.method import METHODS, Method, initial_factor, make_method

SHAPE = (24, 40)
STARTS = [name for name in METHODS if METHODS[name].gradient_start is not Method.gradient_start]


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator)
    weight[:, ::2] = 0
    grad = 1e-6 * torch.randn(SHAPE, generator=generator)
    return weight, grad


def start_of(method: Method):
    return {
        key: initial_factor(spec, key, 0, torch.device("cpu")) for key, spec in method.factors(SHAPE).items()
    }


def gain(method: Method, weight, grad, factors) -> float:
    """The squared norm of the loss' gradient in what starts at zero: the first-order gain of a step along it."""
    own = {key: value.double().requires_grad_() for key, value in factors.items()}
    found = torch.autograd.grad(method.update(weight.double(), **own), list(own.values()), grad.double())
    return sum(float(g[value == 0].square().sum()) for value, g in zip(factors.values(), found, strict=True))


@pytest.mark.parametrize("name", STARTS)
def test_a_first_step_gains_more_than_from_the_default(name):
    method = make_method(name, rank=4)
    for seed in range(3):
        weight, grad = problem(seed)
        default = start_of(method)
        start = method.gradient_start(weight, grad, default)
        assert start is not None
        assert {k: v.shape for k, v in start.items()} == {k: v.shape for k, v in default.items()}
        assert torch.equal(method.update(weight, **start), method.update(weight, **default))
        assert gain(method, weight, grad, start) > 1.5 * gain(method, weight, grad, default)
        for key, value in start.items():
            torch.testing.assert_close(value.square().mean(), default[key].square().mean(), rtol=1e-5, atol=0)


def test_spp_takes_the_first_singular_vector_of_each_block():
    method = make_method("spp", rank=4)
    weight, grad = problem()
    alpha = method.gradient_start(weight, grad, start_of(method))["spp_alpha"]
    for row, block in zip(alpha, (weight * grad).double().split(6), strict=True):
        best = torch.linalg.svd(block).Vh[0]
        assert float((row.double() @ best).abs() / row.double().norm()) == pytest.approx(1, abs=1e-6)
    assert float(alpha[:, ::2].abs().max()) < 1e-6  # nothing is gained where the block is zero


def test_vectors_are_repeatable_signed_and_leave_the_generator_alone():
    matrix = torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = right_vectors(matrix, 4)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(2)
    assert torch.equal(right_vectors(matrix, 4), first)
    assert bool((first.gather(-1, first.abs().argmax(-1, keepdim=True)) > 0).all())
    exact = torch.linalg.svd(matrix).Vh[:, :4]
    torch.testing.assert_close((first * exact).sum(-1).abs(), torch.ones(3, 4), rtol=1e-4, atol=0)


def test_directions_that_do_not_exist_stay_as_they_were():
    start = torch.randn(5, 8)
    vectors = right_vectors(torch.outer(torch.arange(3.0), torch.ones(8)), 5)
    assert torch.equal(vectors[1:], torch.zeros(4, 8))
    mixed = at_norm_of(start, vectors)
    assert torch.equal(mixed[1:], start[1:])
    torch.testing.assert_close(mixed[0].square().mean(), start.square().mean())
    assert torch.equal(at_norm_of(start, right_vectors(torch.zeros(3, 8), 5)), start)
