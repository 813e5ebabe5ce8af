"""verify: one moved zero is enough."""

import pytest

from spp_fx.errors import MaskError
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.verify_masks import Verify
from tests.passes.programs import adapted, canonical

CASES = [
    ("llama", "model.layers.1.mlp.down_proj.weight"),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
    ("gpt-oss", "model.layers.1.mlp.experts.down_proj"),
]


def folded(family):
    program = adapted(canonical(family))
    run_pipeline(program, [Fold()])
    return program


@pytest.mark.parametrize("becomes_zero", [True, False])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_one_flipped_zero_is_named(family, name, becomes_zero):
    program = folded(family)
    weight = program.weight(name).detach()
    flat = weight.view(-1)
    flat[(flat != 0).nonzero()[0] if becomes_zero else (flat == 0).nonzero()[0]] = float(not becomes_zero)
    with pytest.raises(MaskError, match=f"verify: {name}: the mask changed"):
        run_pipeline(program, [Verify()])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_one_violation_of_the_pattern_is_named(family, name):
    program = folded(family)
    program.masks.clear()
    weight = program.canonical_weight(name).detach()
    row = weight[0] if weight.ndim == 2 else weight[0, 0]
    row[:3] = 1.0
    with pytest.raises(
        MaskError, match=rf"verify: {name}: .*row 0, columns 0-3 hold . non-zeros, 2:4 allows 2$"
    ):
        run_pipeline(program, [Verify()])


def test_a_pattern_that_nothing_holds_is_refused():
    with pytest.raises(MaskError, match="1:4 allows 1"):
        run_pipeline(folded("llama"), [Verify(pattern="1:4")])


def test_an_untouched_program_holds():
    program = folded("llama")
    (report,) = run_pipeline(program, [Verify()])
    assert set(report.changed.values()) == {"2:4 holds, mask equal"}
    assert len(report.changed) == 14
