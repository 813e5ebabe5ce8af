"""Dropout whose mask is a function of a seed."""

import torch

from spp_fx.adapters.op import DROPOUT, DROPOUT_SEED

P = 0.25


def test_the_expectation_is_the_input():
    x = torch.full((400, 500), 3.0)
    y = DROPOUT(x, torch.tensor(5), P)
    # The mean of 200,000 draws deviates by 3 * sqrt(p / (1 - p) / 200,000) = 0.004; four times that.
    assert abs(y.mean().item() - 3.0) < 0.016
    assert abs((y == 0).float().mean().item() - P) < 0.005


def test_what_is_kept_is_divided_by_the_probability_to_keep():
    x = torch.randn(50, 60, dtype=torch.float64)
    y = DROPOUT(x, torch.tensor(5), P)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - P), rtol=1e-15, atol=0)
    assert 0 < kept.sum() < kept.numel()


def test_backward_uses_the_mask_of_forward():
    x = torch.randn(50, 60, dtype=torch.float64, requires_grad=True)
    y = DROPOUT(x, torch.tensor(5), P)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0).double() / (1 - P), rtol=1e-15, atol=0)


def test_the_mask_is_a_function_of_the_seed():
    x = torch.randn(20, 30)
    torch.manual_seed(1)
    first = DROPOUT(x, torch.tensor(5), P)
    torch.manual_seed(2)
    assert torch.equal(first, DROPOUT(x, torch.tensor(5), P))
    assert not torch.equal(first, DROPOUT(x, torch.tensor(6), P))


def test_the_mask_does_not_depend_on_how_rows_are_grouped():
    x = torch.randn(4, 6, 30)
    flat = DROPOUT(x.reshape(24, 30), torch.tensor(5), P)
    assert torch.equal(DROPOUT(x, torch.tensor(5), P), flat.view(4, 6, 30))


def test_probability_zero_is_the_identity():
    x = torch.randn(20, 30)
    assert torch.equal(DROPOUT(x, torch.tensor(5), 0.0), x)


def test_drawing_a_mask_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    DROPOUT(torch.randn(0, 4), torch.tensor(5), P)
    DROPOUT(torch.ones(3, 4), torch.tensor(5), P)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_follows_the_global_generator():
    torch.manual_seed(3)
    first, second = DROPOUT_SEED(P), DROPOUT_SEED(P)
    torch.manual_seed(3)
    assert DROPOUT_SEED(P) == first
    assert first != second


def test_no_seed_is_drawn_where_nothing_is_dropped():
    before = torch.get_rng_state()
    assert DROPOUT_SEED(0.0) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_opcheck():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(DROPOUT, (x, torch.tensor(5), P))
    # The seed itself is random: only what must hold of any draw is checked.
    torch.library.opcheck(DROPOUT_SEED, (P,), test_utils=("test_schema", "test_faketensor"))
