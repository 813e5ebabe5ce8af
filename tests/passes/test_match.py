"""match: which sites are taken, and why the others are not."""

import pytest
import torch

from spp_fx.errors import PatternError, PreconditionError, UsageError
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.passes.programs import adapted, canonical


def matched(program, **options):
    item = Match(**options)
    (report,) = run_pipeline(program, [item])
    return set(program.matched), report.skipped


def test_without_targets_every_linear_of_the_layers_is_taken():
    names, refused = matched(canonical("llama"))
    assert len(names) == 14
    assert refused == {"lm_head.weight": "makes the logits; name it in the targets to take it"}


def test_the_pattern_is_read_from_the_weights():
    program = canonical("gpt2")
    matched(program)
    assert {str(p) for p in program.matched.values()} == {"2:4"}


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("q_proj", 2),
        ("mlp.up_proj", 2),
        ("model.layers.0.*", 7),
        ("model.layers.1.self_attn.q_proj", 1),
        ("model.layers.1.self_attn.q_proj.weight", 1),
    ],
)
def test_a_target_is_a_suffix_a_glob_or_a_whole_name(target, count):
    names, refused = matched(canonical("llama"), targets=(target,))
    assert len(names) == count
    assert set(refused.values()) == {"not among the targets"}


def test_a_target_is_not_half_a_word():
    with pytest.raises(UsageError, match=r"no site is named proj; the model has: .*q_proj"):
        matched(canonical("llama"), targets=("proj",))


def test_an_unknown_target_lists_what_there_is():
    with pytest.raises(UsageError, match=r"no site is named nosuch; the model has: down_proj.*v_proj"):
        matched(canonical("llama"), targets=("q_proj", "nosuch"))


def test_a_dense_model_is_refused_with_what_to_do():
    program = canonical("llama")
    with torch.no_grad():
        for name in program.sites:
            program.weight(name).fill_(1.0)
    with pytest.raises(PatternError, match=r"the model is dense: none of 14 .*spp-fx prune"):
        matched(program)


def test_a_dense_site_beside_sparse_ones_is_refused_and_taken_on_demand():
    program = canonical("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        program.weight(name).fill_(1.0)
    names, refused = matched(program)
    assert refused[name] == "dense: it has no zeros to keep"
    assert name not in names
    names, _ = matched(program, dense=True)
    assert name in names


def test_a_tied_head_is_refused_even_if_named():
    with pytest.raises(UsageError, match="tied to the embedding"):
        matched(canonical("llama-tied"), targets=("lm_head",))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_routers_are_refused(family):
    program = canonical(family)
    names, refused = matched(program, dense=True)
    routers = {name for name, site in program.sites.items() if site.shape == (4, 32)}
    assert len(routers) == 2
    assert not routers & names
    assert {refused[name] for name in routers} == {
        "routes tokens to experts; name it in the targets to take it"
    }


def test_sites_are_not_chosen_anew_under_adapters():
    program = adapted(canonical("llama"))
    chosen = dict(program.matched)
    with pytest.raises(PreconditionError, match="match: the program has adapters; fold them"):
        run_pipeline(program, [Match(targets=("q_proj",))])
    assert program.matched == chosen
