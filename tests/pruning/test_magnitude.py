"""Magnitude pruning against its plain definition."""

import pytest
import torch

from spp_fx.errors import PatternError
from spp_fx.pruning.criteria.magnitude import Magnitude
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import parse_pattern


def mask_of(weight: torch.Tensor, text: str) -> torch.Tensor:
    return Magnitude().prune(weight, Inputs(weight.shape[1]), parse_pattern(text))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:5", 3, 5)]
)
def test_n_m_keeps_the_largest_of_each_group(dtype, text, kept, group):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = mask_of(weight, text)
    for row, flags in zip(weight.tolist(), mask.tolist(), strict=True):
        for start in range(0, 40, group):
            order = sorted(range(group), key=lambda i: (-abs(row[start + i]), i))[:kept]
            assert [i for i in range(group) if flags[start + i]] == sorted(order)


@pytest.mark.parametrize(("text", "share"), [("50%", 0.5), ("62.5%", 0.625), ("10%", 0.1), ("99%", 0.99)])
def test_unstructured_drops_exactly_the_smallest_share(text, share):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    mask = mask_of(weight, text)
    assert int((~mask).sum()) == int(share * 960)
    assert float(weight[mask].abs().min()) >= float(weight[~mask].abs().max())


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_ties_keep_the_earlier_entry(text):
    mask = mask_of(torch.ones(1, 8), text)
    expected = [True, True, False, False] * 2 if text == "2:4" else [True] * 4 + [False] * 4
    assert mask.tolist() == [expected]


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_float64_is_ranked_in_float64(text):
    weight = torch.tensor([[1, 1 + 2**-41, 1 + 2**-40, 3]], dtype=torch.float64)
    assert mask_of(weight, text).tolist() == [[False, False, True, True]]


def test_inputs_that_no_group_divides_are_refused():
    with pytest.raises(PatternError, match="multiple of 4"):
        mask_of(torch.ones(2, 6), "2:4")
