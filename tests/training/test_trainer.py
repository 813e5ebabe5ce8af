"""What the trainer decays."""

import pytest

from spp_fx.training.trainer import undecayed
from tests.passes.programs import adapted, canonical


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_factors_that_start_at_one_have_no_weight_decay(family):
    """It would shrink the weights themselves."""
    program = adapted(canonical(family), "fused", "scale-lora")
    assert undecayed(program) == {name for name, value in program.named_parameters() if value.requires_grad}
    assert undecayed(adapted(canonical(family), "fused", "spp")) == set()
