"""Options of a method site by site, and the ranks of a budget."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.adapters.method import make_method
from spp_fx.adapters.op import ops_of
from spp_fx.adapters.per_site import (
    as_overrides,
    from_patterns,
    method_by_site,
    parse_budget,
    rank_of,
    size_of,
    spread,
    to_patterns,
)
from spp_fx.errors import FormatError, UsageError

SITES = [
    f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
]
SPP, SQFT = make_method("spp", rank=4), make_method("sqft", rank=4)


def ranks(methods) -> list[int]:
    return [rank_of(method) for method in methods.values()]


def test_the_last_override_that_names_a_site_counts():
    found = method_by_site(SPP, ["rank:down_proj@8", "rank:model.layers.0.*@2", "scale:q_proj@1"], SITES)
    assert ranks(found) == [2, 2, 4, 8]
    assert [method.scale for method in found.values()] == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank:nosuch@8", "'nosuch' names no site; there are: down_proj, q_proj"),
        ("rank:q_proj@0", "spp: rank must be at least 1, got 0"),
        ("rank:q_proj@much", "option rank takes int, got 'much'"),
        ("rank:q_proj@2.5", "option rank takes int"),
        ("scale:q_proj@nan", "scale must be a finite number"),
        ("alpha:q_proj@1", "spp has no number alpha to set site by site; it has: rank, scale, dropout"),
        ("q_proj@1", "is not an override; write OPTION:NAME@VALUE"),
        ("rank:@1", "is not an override"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused_with_its_reason(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        method_by_site(SPP, [text], SITES)


def test_a_configuration_gives_back_what_differs_and_nothing_else():
    methods = method_by_site(SPP, ["rank:down_proj@8", "scale:model.layers.1.*@0.5"], SITES)
    config = to_patterns(SPP, methods)
    assert config["rank_pattern"] == {f"model.layers.{i}.mlp.down_proj": 8 for i in range(2)}
    assert from_patterns(SPP, SITES, config) == methods
    assert to_patterns(SPP, dict.fromkeys(SITES, SPP)) == {}
    assert method_by_site(SPP, as_overrides(SPP, methods), SITES) == methods


def test_a_site_whose_name_ends_anothers_keeps_its_own_options():
    sites = ["a.fc.weight", "b.a.fc.weight"]
    for own in ((2, 4), (4, 2)):
        methods = {site: replace(SPP, rank=rank) for site, rank in zip(sites, own, strict=True)}
        assert method_by_site(SPP, as_overrides(SPP, methods), sites) == methods


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"model.layers.9.q_proj": 2}}, "is not one of the adapter's sites"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj": 2.0}}, "must be int, got 2.0"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj": True}}, "must be int, got True"),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 2}}, "spp has no number alpha"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object of modules and their values"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(config, message):
    with pytest.raises(FormatError, match=message):
        from_patterns(SPP, SITES, config)
    assert from_patterns(SPP, SITES, {"alpha_pattern": {}}) == dict.fromkeys(SITES, SPP)  # as PEFT writes it


def test_many_ranks_share_one_set_of_ops():
    made = {id(ops_of(replace(SPP, rank=rank), (64, 32))) for rank in (1, 2, 4, 8, 16)}
    assert len(made) == 1


SHAPES = dict(zip(SITES, [(64, 32), (32, 96), (64, 32), (32, 96)], strict=True))
SAME = dict.fromkeys(SITES, 1.0)


@given(
    method=st.sampled_from([SPP, SQFT]),
    budget=st.integers(200, 20_000),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4).filter(any),
)
def test_a_budget_is_used_until_no_rank_can_be_raised_alone(method, budget, weights):
    own = dict(zip(SITES, weights, strict=True))
    found, refused = spread(dict.fromkeys(SITES, method), SHAPES, own, budget)
    assert set(found) | set(refused) == set(SITES)
    assert not set(found) & set(refused)
    used = sum(size_of(each, SHAPES[site]) for site, each in found.items())
    assert used <= budget
    for site, shape in SHAPES.items():
        if not own[site]:
            assert site in refused
            continue
        rank = rank_of(found[site]) if site in found else 0
        now = size_of(found[site], shape) if rank else 0
        assert rank == 0 or found[site].refusal(shape) is None
        larger = (replace(method, rank=r) for r in range(rank + 1, shape[0] + 1))
        step = next((size_of(each, shape) for each in larger if each.refusal(shape) is None), None)
        assert step is None or step > shape[0] * shape[1] or used - now + step > budget


def test_by_size_every_site_has_the_same_rank_and_by_weight_ranks_are_in_proportion():
    shapes = dict.fromkeys(SITES, (64, 64))
    methods = dict.fromkeys(SITES, SQFT)
    assert ranks(spread(methods, shapes, SAME, 4 * 8 * 128)[0]) == [8] * 4
    assert ranks(spread(methods, shapes, SAME, 4 * 8 * 128 + 127)[0]) == [8] * 4
    assert ranks(spread(methods, shapes, SAME, 4 * 8 * 128 + 128)[0]) == [9, 8, 8, 8]
    uneven = dict(zip(SITES, (1.0, 2.0, 3.0, 2.0), strict=True))
    assert ranks(spread(methods, shapes, uneven, 32 * 128)[0]) == [4, 8, 12, 8]


def test_spp_takes_the_divisor_below_the_common_rank():
    shapes = {SITES[0]: (48, 16), SITES[1]: (40, 16)}
    found, _ = spread(dict.fromkeys(shapes, SPP), shapes, SAME, 48 + 12 * 16 + 40 + 10 * 16)
    assert ranks(found) == [12, 10]


def test_a_site_without_a_rank_and_a_budget_without_a_site_say_so():
    shapes = {SITES[0]: (64, 64), SITES[1]: (64, 64)}
    found, refused = spread(dict.fromkeys(shapes, SQFT), shapes, SAME, 130)
    assert list(found) == [SITES[0]]
    assert refused == {SITES[1]: "the budget of 130 parameters leaves no rank for it"}
    with pytest.raises(UsageError, match="100 parameters give no site a rank; the smallest step takes 128"):
        spread(dict.fromkeys(shapes, SQFT), shapes, SAME, 100)


@pytest.mark.parametrize("text", ["0", "-1", "0%", "nan%", "inf%", "half", "1.5", "", "%"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="--budget takes a share of the model's parameters"):
        parse_budget(text, 1000)
    assert [parse_budget(each, 1000) for each in ("0.3%", 30, "1_000", "100%")] == [3, 30, 1000, 1000]
    assert [parse_budget("2.5%", total) for total in (100, 656_000)] == [2, 16_400]
