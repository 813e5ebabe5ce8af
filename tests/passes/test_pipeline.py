"""Pipelines: spelt, read back, refused where they are wrong, run with their conditions."""

import string
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.adapters.method import Method
from spp_fx.adapters.spp import SPP
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.passes.base import PASSES, Pass, PassReport, register
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import parse_pipeline, print_pipeline, run_pipeline
from spp_fx.pruning.criteria.magnitude import Magnitude
from spp_fx.pruning.criteria.ria import Ria
from spp_fx.pruning.criteria.sparsegpt import SparseGpt
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.pruning.criterion import Criterion
from tests.adapters.layers import linear_program

WORD = st.text(string.ascii_letters + string.digits + "_.*?[]:%-", min_size=1, max_size=12)
VALUES = {
    str: WORD,
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    float | None: st.none() | st.floats(allow_nan=False),
    int | None: st.none() | st.integers(),
    bool | None: st.none() | st.booleans(),
    tuple[str, ...]: st.lists(WORD, max_size=3).map(tuple),
    Method: st.builds(
        SPP, rank=st.integers(1, 512), scale=st.floats(0.1, 8), dropout=st.floats(0, 1, exclude_max=True)
    ),
    Criterion: st.sampled_from([Magnitude(), Wanda(), Ria(permute=True)])
    | st.builds(SparseGpt, damp=st.floats(0, 8), block_size=st.integers(1, 512)),
}


def passes_of(cls: type[Pass]) -> st.SearchStrategy[Pass]:
    types = get_type_hints(cls)
    own = {field.name: values_of(types[field.name]) for field in fields(cls)}
    if cls is Inject:  # its overrides are read with the method: see the test below
        own["overrides"] = st.just(())
    return st.builds(cls, **own)


def values_of(hint) -> st.SearchStrategy:
    return st.sampled_from(get_args(hint)) if get_origin(hint) is Literal else VALUES[hint]


@pytest.fixture
def small():
    return linear_program(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), None)


@pytest.fixture
def registered():
    """Registers a pass for one test."""
    added = []

    def add(name: str):
        added.append(name)
        return register(name)

    yield add
    for name in added:
        del PASSES[name]


@given(
    st.lists(st.sampled_from(sorted(PASSES)).flatmap(lambda n: passes_of(PASSES[n])), min_size=1, max_size=4)
)
def test_parsing_a_printed_pipeline_gives_the_pipeline(passes):
    assert parse_pipeline(print_pipeline(passes)) == passes


def test_numbers_of_a_method_for_some_sites_are_spelt_in_one_list():
    overrides = ("rank:down_proj@32", "scale:model.layers.0.*@0.5")
    text = "inject{rank=8,overrides=rank:down_proj@32,scale:model.layers.0.*@0.5}"
    assert parse_pipeline(text) == [Inject(SPP(rank=8), overrides)]
    assert print_pipeline([Inject(SPP(rank=8), overrides)]) == text


def test_a_comma_without_an_option_continues_the_list_before_it():
    assert parse_pipeline("match{targets=q_proj,v_proj,dense=true},inject{rank=8}") == [
        Match(targets=("q_proj", "v_proj"), dense=True),
        Inject(SPP(rank=8)),
    ]


def test_blanks_between_words_mean_nothing():
    assert parse_pipeline(" canonicalize , match{ targets = a , b } ") == [
        Canonicalize(),
        Match(targets=("a", "b")),
    ]


def test_options_at_their_defaults_are_not_printed():
    assert print_pipeline([Match(), Inject(SPP(scale=2.0, rank=8))]) == "match,inject{rank=8}"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "a pass is missing"),
        ("   ", "a pass is missing|character 0"),
        ("match,", "a pass is missing"),
        (",match", "character 0"),
        ("match,,inject", "character 6"),
        ("match inject", "character 0"),
        ("canonicalize,match{targets=a", "'match{targets=a' at character 13"),
        ("match}", "character 0"),
        ("match{targets={a}}", "character 0"),
        ("Match", "character 0"),
        ("nosuch", "unknown pass 'nosuch'; known: .*canonicalize.*verify"),
        ("match{nosuch=1}", "match: unknown option 'nosuch'; known: dense, targets"),
        ("canonicalize{a=1}", "canonicalize: unknown option 'a'; known: none"),
        ("match{q_proj}", "match: 'q_proj' is not an option"),
        (
            "prune{method=wanda,damp=1}",
            "wanda has no option damp; it has: none; sparsegpt has it",
        ),
        ("prune{damp=1,method=ria}", "ria has no option damp; it has: permute; sparsegpt has it"),
        ("prune{method=sparsegpt,damp=much}", "prune: option damp takes float, got 'much'"),
        ("prune{method=nosuch,damp=1}", "unknown pruning method 'nosuch'; known: .*wanda"),
        ("inject{rank=many}", "inject: option rank takes int, got 'many'"),
        ("inject{rank=1,2}", "inject: option rank takes int, got '1,2'"),
        ("inject{rank=}", "inject: option rank takes int, got ''"),
        ("inject{scale=two}", "inject: option scale takes float, got 'two'"),
        ("match{dense=perhaps}", "match: option dense takes bool, got 'perhaps'"),
        ("inject{nosuch=2}", "spp has no option nosuch; it has: dropout, rank, scale$"),
        ("inject{method=nosuch}", "unknown adapter method 'nosuch'; known: .*spp"),
        ("inject{rank=1,rank=2}", "inject: option 'rank' is given twice"),
    ],
)
def test_a_wrong_spelling_is_a_usage_error_that_says_where(text, where):
    with pytest.raises(UsageError, match=where):
        parse_pipeline(text)


@pytest.mark.parametrize("target", ["a,b", "a=b", "{", "}"])
def test_a_value_that_cannot_be_read_back_is_not_printed(target):
    with pytest.raises(UsageError, match="cannot be spelt"):
        print_pipeline([Match(targets=(target,))])


@pytest.mark.parametrize("text", ["match", "inject", "lower", "fold", "verify"])
def test_a_pass_refuses_a_program_that_is_not_ready_for_it(small, text):
    with pytest.raises(PreconditionError, match=rf"{text}: .*passes that ran before: none"):
        run_pipeline(small, parse_pipeline(text))


def test_a_failed_condition_names_the_passes_that_ran_before(small):
    passes = parse_pipeline("canonicalize,match{targets=layer},lower")
    with pytest.raises(PreconditionError, match=r"before: canonicalize, match\{targets=layer\}\)"):
        run_pipeline(small, passes)


def test_a_broken_promise_is_raised_and_not_recorded_as_run(small, registered):
    @registered("promises")
    @dataclass(frozen=True)
    class Promises(Pass):
        def apply(self, program):
            return PassReport()

        def ensures(self, program):
            raise PostconditionError("promises: broken")

    with pytest.raises(PostconditionError, match="promises: broken"):
        run_pipeline(small, parse_pipeline("canonicalize,promises"))
    assert small.history == ["canonicalize"]


def test_reports_reach_the_callback_in_order(small):
    seen = []
    passes = parse_pipeline("canonicalize,match{targets=layer}")
    reports = run_pipeline(small, passes, after=lambda item, report: seen.append((item, report)))
    assert [item for item, _ in seen] == passes
    assert [report for _, report in seen] == reports


def test_a_pass_run_twice_keeps_both_reports(small, registered):
    @registered("count")
    @dataclass(frozen=True)
    class Count(Pass):
        def apply(self, program):
            return PassReport(changed={"runs": str(len(program.history))})

    reports = run_pipeline(small, parse_pipeline("count,count"))
    assert [report.changed["runs"] for report in reports] == ["0", "1"]
    assert small.history == ["count", "count"]


def test_a_pass_needs_one_registration_to_be_read_printed_and_run(small, registered):
    @registered("negate")
    @dataclass(frozen=True)
    class Negate(Pass):
        times: int = 1
        names: tuple[str, ...] = ()

        def apply(self, program):
            for name in self.names:
                program.weight(name).data *= (-1) ** self.times
            return PassReport(changed=dict.fromkeys(self.names, "negated"))

    (item,) = parse_pipeline("negate{times=3,names=layer.weight}")
    assert item == Negate(times=3, names=("layer.weight",))
    assert print_pipeline([item]) == "negate{times=3,names=layer.weight}"
    run_pipeline(small, [item])
    assert small.weight("layer.weight").tolist() == [[-1.0, 0.0, 0.0, -2.0]]
