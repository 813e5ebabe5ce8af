"""Methods by name, their settings, and the start of their factors."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from spp_fx.adapters.method import FactorSpec, Method, Run, check_update, initial_factor, make_method
from spp_fx.adapters.spp import SPP
from spp_fx.errors import UsageError
from tests.adapters.layers import METHODS

CPU = torch.device("cpu")


def test_a_method_is_made_by_its_name():
    assert make_method("spp", rank=8, scale=1.0, dropout=0.1) == SPP(8, 1.0, 0.1)


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown adapter method 'sp'; known: .*spp"):
        make_method("sp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": -4}, "rank must be at least 1"),
        ({"scale": 0.0}, "scale must be a finite number other than 0"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"scale": math.inf}, "scale must be a finite number"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        make_method("spp", **settings)


def test_an_option_that_the_method_does_not_have_is_refused():
    with pytest.raises(UsageError, match=r"spp has no option power; it has: dropout, rank, scale$"):
        make_method("spp", power=2)


def test_the_factors_of_a_matrix_and_of_a_stack():
    specs = SPP(rank=4).factors((8, 6))
    assert specs == {
        "spp_alpha": FactorSpec((4, 6), "kaiming", rows=2, columns=1),
        "spp_beta": FactorSpec((8, 1), "zeros", rows=1),
    }
    specs = SPP(rank=4).factors((3, 8, 6))
    assert [spec.shape for spec in specs.values()] == [(3, 4, 6), (3, 8, 1)]
    assert sum(spec.numel for spec in specs.values()) == 3 * (4 * 6 + 8)


def test_usable_ranks_divide_every_shape():
    assert SPP().usable_ranks([(24, 5), (36, 7), (2, 12, 3)]) == [1, 2, 3, 4, 6, 12]


def test_a_rank_that_does_not_divide_is_refused_with_the_numbers():
    assert SPP(rank=5).refusal((12, 4)) == "rank 5 does not divide its 12 output features"
    assert SPP(rank=4).refusal((12, 4)) is None


def test_the_kaiming_start_fills_its_interval():
    bound = 1 / math.sqrt(64)
    start = initial_factor(FactorSpec((100, 64), "kaiming"), "site.spp_alpha", 0, CPU)
    assert start.dtype == torch.float32
    assert -bound <= start.min() < -0.99 * bound
    assert 0.99 * bound < start.max() <= bound


@pytest.mark.parametrize(("ones", "at"), [("row", (..., 0, slice(None))), ("column", (..., 0))])
def test_a_row_or_column_may_start_as_ones(ones, at):
    plain = initial_factor(FactorSpec((2, 4, 8), "kaiming"), "key", 0, CPU)
    start = initial_factor(FactorSpec((2, 4, 8), "kaiming", ones=ones), "key", 0, CPU)
    assert torch.equal(start[at], torch.ones_like(start[at]))
    plain[at] = 1
    assert torch.equal(start, plain)


def test_the_multipliers_of_scale_lora_start_at_exactly_one():
    specs = make_method("scale-lora", rank=5).factors((2, 12, 9))
    a, b = (initial_factor(spec, key, 0, CPU) for key, spec in specs.items())
    assert torch.equal(b @ a, torch.ones(2, 12, 9))


def test_the_start_is_a_function_of_seed_and_key_alone():
    spec = FactorSpec((4, 8), "kaiming")
    first = initial_factor(spec, "a", 0, CPU)
    torch.manual_seed(99)
    assert torch.equal(first, initial_factor(spec, "a", 0, CPU))
    assert not torch.equal(first, initial_factor(spec, "b", 0, CPU))
    assert not torch.equal(first, initial_factor(spec, "a", 1, CPU))


def test_making_a_start_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    initial_factor(FactorSpec((4, 8), "kaiming"), "a", 0, CPU)
    assert torch.equal(torch.get_rng_state(), before)


GROUPED = FactorSpec((8, 32), "zeros", rows=16, columns=1)


@pytest.mark.parametrize(
    ("update", "spec", "message"),
    [
        (lambda w, g: w * g.repeat_interleave(16, -2), GROUPED, "take group sizes from the shapes"),
        (lambda w, g: 0 * w + g, FactorSpec((128, 1), "zeros", rows=1), "not zero where the weight is zero"),
        (lambda w, g: w * g, FactorSpec((128, 7), "zeros", rows=1), "update fails for rows"),
        (lambda w, g: w[:1] * g.sum(), GROUPED, r"update of shape \[1, 32\] for a weight of \[64, 32\]"),
        (lambda w, g: w * g.sum(), FactorSpec((128, 1), "zeros", rows=1), "rows alone is not that of all"),
    ],
    ids=["a fixed group size", "a moved zero", "no broadcast", "a lost shape", "rows that see one another"],
)
def test_an_update_that_breaks_the_contract_is_refused_before_training(update, spec, message):
    with pytest.raises(UsageError, match=f"wrong: .*{message}"):
        check_update(made_up(update, spec), (128, 32))


@pytest.mark.parametrize("shape", [(128, 32), (24, 32), (3, 48, 6), (1, 2)])
def test_an_update_that_keeps_the_contract_passes(shape):
    for rank in (1, 2, 4, 16):
        for name in ("spp", "sqft", "lors", "hira", "scale-lora"):
            method = make_method(name, rank=rank)
            if not method.refusal(shape):
                check_update(method, shape)
    check_update(make_method("masked-full"), shape)
    by_shape = made_up(lambda w, g: w * g.repeat_interleave(w.shape[-2] // g.shape[-2], -2), GROUPED)
    check_update(by_shape, (128, 32))


def made_up(update, spec: FactorSpec) -> Method:
    @dataclass(frozen=True)
    class MadeUp(Method):
        def factors(self, shape):
            return {"g": spec}

        def update(self, weight, g):
            return update(weight, g)

    MadeUp.name = "wrong"
    return MadeUp()


RUN = Run(steps=100, width=512, spread=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_a_longer_run_and_a_wider_model_get_a_lower_rate(name):
    method = METHODS[name]
    rate = method.rate(RUN)
    assert 0 < method.rate(replace(RUN, steps=800)) < rate < 1
    assert 0 < method.rate(replace(RUN, width=8192)) < rate


@pytest.mark.parametrize("name", ["spp", "hira", "sqft", "lors"])
def test_the_rate_makes_up_for_the_scale(name):
    """The change is s times a product of two factors, of which each moves by the rate."""
    small, large = (make_method(name, scale=scale) for scale in (0.5, -8.0))
    assert small.rate(RUN) == pytest.approx(4 * large.rate(RUN))


@pytest.mark.parametrize(("name", "power"), [("sqft", 0.5), ("lors", 0.5), ("masked-full", 1)])
def test_what_is_added_to_weights_follows_their_size(name, power):
    method = METHODS[name]
    assert method.rate(replace(RUN, spread=0.2)) == pytest.approx(4**power * method.rate(RUN))


@pytest.mark.parametrize("name", ["spp", "hira", "scale-lora"])
def test_what_multiplies_weights_does_not(name):
    assert METHODS[name].rate(replace(RUN, spread=0.2)) == METHODS[name].rate(RUN)
