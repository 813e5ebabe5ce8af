"""Names that adapters get."""

import torch

from spp_fx.graph.program import Site, factor_attribute


def test_factors_of_a_plain_weight_lie_beside_it():
    assert factor_attribute("weight", "spp_alpha") == "spp_alpha"


def test_factors_of_a_named_stack_carry_its_name():
    assert factor_attribute("gate_up_proj", "spp_alpha") == "gate_up_proj_spp_alpha"


def test_a_stack_counts_every_expert():
    site = Site("experts.up", "experts", (4, 6, 8), torch.float32, True, 0, 1, None, False)
    assert (site.out_features, site.in_features, site.numel) == (6, 8, 192)
