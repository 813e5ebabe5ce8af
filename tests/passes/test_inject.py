"""inject: adapters that begin as nothing, and train alone."""

import pytest
import torch

from spp_fx.adapters.spp import SPP
from spp_fx.errors import PreconditionError, UsageError
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.families import SPREAD, batch
from tests.passes.programs import adapted, canonical, sparse


def factors(program) -> dict[str, torch.Tensor]:
    return {name: p for name, p in program.named_parameters() if p.requires_grad}


def test_a_rank_that_does_not_divide_lists_those_that_do():
    with pytest.raises(
        UsageError, match=r"rank 7 does not divide its 32 .*\(14 of 14 sites\).*: 1, 2, 4, 8, 16$"
    ):
        adapted(canonical("llama"), rank=7)


def test_an_unknown_method_lists_the_known():
    with pytest.raises(UsageError, match=r"unknown adapter method 'nosuch'; known: .*spp"):
        adapted(canonical("llama"), method="nosuch")


@pytest.mark.parametrize("family", SPREAD)
def test_only_the_factors_train(family):
    program = adapted(canonical(family))
    assert len(factors(program)) == 2 * len(program.matched)
    assert all(name.endswith(("spp_alpha", "spp_beta")) for name in factors(program))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", SPREAD)
@torch.no_grad()
def test_new_adapters_change_nothing(family, dropout):
    model, program = sparse(family)
    adapted(program, None, dropout=dropout).train(
        dropout > 0 and not program.config.to_dict().get("attn_pdrop")
    )
    if family == "llama-tied":
        program.eval()
    torch.testing.assert_close(program(batch()).logits, model(batch()).logits, rtol=0, atol=1e-6)


def test_injecting_twice_is_refused():
    with pytest.raises(PreconditionError, match="has adapters already"):
        run_pipeline(adapted(canonical("llama")), [Inject(SPP(rank=4))])


def test_factors_start_the_same_whatever_the_targets():
    every = factors(adapted(canonical("llama"), None))
    program = canonical("llama")
    run_pipeline(program, [Match(targets=("v_proj", "q_proj")), Inject(SPP(rank=4))])
    some = factors(program)
    assert len(some) == 8
    assert all(torch.equal(value, every[name]) for name, value in some.items())


def test_another_seed_gives_other_factors():
    one, two = (factors(adapted(canonical("llama"), None, seed=seed)) for seed in (0, 1))
    assert not any(torch.equal(one[name], two[name]) for name in one if name.endswith("alpha"))


def test_sites_of_one_shape_do_not_start_alike():
    alphas = [v for k, v in factors(adapted(canonical("llama"), None)).items() if k.endswith("alpha")]
    assert len({tuple(a.flatten().tolist()) for a in alphas}) == len(alphas)
