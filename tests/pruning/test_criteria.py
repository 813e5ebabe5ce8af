"""Criteria that look at the inputs, against plain loops over their formulas."""

import math

import pytest
import torch

from spp_fx.errors import PatternError, UsageError
from spp_fx.pruning.criteria.ria import Ria
from spp_fx.pruning.criteria.sparsegpt import sparsegpt
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.pruning.recipe import dsnot
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import NM, parse_pattern

PATTERNS = ["2:4", "4:8", "2:8", "50%", "75%", "62.5%"]
OUT, IN = 12, 32


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    x = torch.randn(200, IN, generator=generator) * torch.rand(IN, generator=generator) * 3
    return weight, x


def mask_of(criterion, weight: torch.Tensor, x: torch.Tensor, text: str) -> torch.Tensor:
    inputs = Inputs(weight.shape[1])
    inputs.add(x)
    mask, values = criterion.prune(weight, inputs, parse_pattern(text))
    assert values is None
    return mask


def keep_largest(scores: list[float], count: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in order for i in range(len(scores))]


def expected_mask(score: torch.Tensor, text: str, *, by_row: bool) -> list[list[bool]]:
    pattern, rows = parse_pattern(text), score.tolist()
    if isinstance(pattern, NM):
        return [
            [
                flag
                for g in range(0, IN, pattern.group)
                for flag in keep_largest(row[g : g + pattern.group], pattern.kept)
            ]
            for row in rows
        ]
    if by_row:
        return [keep_largest(row, IN - int(pattern.share * IN)) for row in rows]
    flat = keep_largest([value for row in rows for value in row], OUT * IN - int(pattern.share * OUT * IN))
    return [flat[i * IN : (i + 1) * IN] for i in range(OUT)]


@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_is_weight_times_norm_within_a_row(data, text):
    weight, x = data
    norms = x.norm(dim=0)
    assert mask_of(Wanda(), weight, x, text).tolist() == expected_mask(
        weight.abs() * norms, text, by_row=True
    )


@pytest.mark.parametrize("text", PATTERNS)
def test_ria_is_relative_importance_times_a_root_of_the_norm(data, text):
    weight, x = data
    norms = x.norm(dim=0)
    score = torch.empty(OUT, IN)
    for i in range(OUT):
        for j in range(IN):
            size = weight[i, j].abs()
            relative = size / weight[:, j].abs().sum() + size / weight[i].abs().sum()
            score[i, j] = relative * math.sqrt(norms[j])
    assert mask_of(Ria(), weight, x, text).tolist() == expected_mask(score, text, by_row=False)


def test_a_row_and_a_column_of_zeros_have_no_importance(data):
    weight, x = data
    weight[3], weight[:, 5] = 0, 0
    mask = mask_of(Ria(), weight, x, "50%")
    assert not mask[3].any()
    assert not mask[:, 5].any()


@pytest.mark.parametrize("criterion", [Wanda(), Ria()])
def test_ties_keep_the_earlier(criterion):
    mask = mask_of(criterion, torch.ones(2, 8), torch.eye(8), "2:4")
    assert mask.tolist() == [[True, True, False, False] * 2] * 2


def plain_sparsegpt(weight, x, text, damp, block):
    """Algorithm 1 in float64, the Hessian's inverse shrunk by elimination instead of a Cholesky factor."""
    pattern, w = parse_pattern(text), weight.double().clone()
    hessian = (x.t() @ x).double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)
    scale, left = [], inverse.clone()
    for _ in range(IN):  # the first diagonal entry of what is left is U_jj^2
        scale.append(left[0, 0].item())
        left = left[1:, 1:] - left[1:, :1] * left[:1, 1:] / left[0, 0]
    scale = torch.tensor(scale, dtype=torch.float64)
    kept = torch.ones(OUT, IN, dtype=torch.bool)
    left = inverse
    for j in range(IN):
        if isinstance(pattern, NM) and j % pattern.group == 0:
            for i in range(OUT):
                score = (w[i, j : j + pattern.group] ** 2 / scale[j : j + pattern.group]).tolist()
                kept[i, j : j + pattern.group] = torch.tensor(keep_largest(score, pattern.kept))
        if not isinstance(pattern, NM) and j % block == 0:
            score = w[:, j : j + block] ** 2 / scale[j : j + block]
            count = score.numel() - int(pattern.share * score.numel())
            kept[:, j : j + block] = torch.tensor(keep_largest(score.flatten().tolist(), count)).view(
                score.shape
            )
        error = torch.where(kept[:, j], 0.0, w[:, j])
        w[:, j + 1 :] -= error[:, None] * left[:1, 1:] / left[0, 0]
        w[~kept[:, j], j] = 0
        left = left[1:, 1:] - left[1:, :1] * left[:1, 1:] / left[0, 0]
    return w, kept


@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(data, text, block):
    weight, x = data
    x[:, 7] = 0
    w, kept = sparsegpt(weight, x.t() @ x, parse_pattern(text), damp=0.01, block_size=block)
    expected, mask = plain_sparsegpt(weight, x, text, 0.01, block)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(w.double(), expected, rtol=1e-4, atol=1e-5)
    assert bool((w[~kept] == 0).all())
    assert bool((w[:, 7] == 0).all())


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_loses_less_than_its_mask_alone(data, text):
    weight, x = data
    w, kept = sparsegpt(weight, x.t() @ x, parse_pattern(text))
    lost = (x @ (w - weight).t()).norm()
    assert lost < (x @ (weight * kept - weight).t()).norm()


def test_sparsegpt_does_not_write_to_what_it_is_given(data):
    weight, x = data
    hessian = x.t() @ x
    before = weight.clone(), hessian.clone()
    sparsegpt(weight, hessian, parse_pattern("2:4"))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_sparsegpt_refuses_what_it_cannot_invert_or_divide(data):
    weight, x = data
    with pytest.raises(PatternError, match="raise --damp"):
        sparsegpt(weight, -(x.t() @ x), parse_pattern("2:4"))
    with pytest.raises(PatternError, match="not a multiple of 5"):
        sparsegpt(weight, x.t() @ x, parse_pattern("2:5"))
    with pytest.raises(UsageError, match="not a whole number of groups"):
        sparsegpt(weight, x.t() @ x, parse_pattern("4:8"), block_size=12)


def test_sparsegpt_drops_the_share_of_the_whole_matrix_however_blocks_round():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 640), torch.randn(900, 640)
    _, kept = sparsegpt(weight, x.t() @ x, parse_pattern("30%"))
    assert int((~kept).sum()) == int(0.3 * 64 * 640)


def test_dsnot_swaps_where_an_input_is_constant():
    """Such an input has no variance: growing its weight is the best there is, in a group that can give one up."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    x[:, 0] = 100
    weight = torch.tensor([[1.0, 2, 3, -4, 1, 1, 1, 1]])
    mask = torch.tensor([[False, True, False, True, True, True, False, False]])
    x[:, 3] += 2
    x[:, 6] += 50  # so that the swap does not turn the sign of the error
    inputs = Inputs(8)
    inputs.add(x)
    repaired = dsnot(weight, mask, inputs, parse_pattern("2:4"))
    assert repaired[0, 0]
    assert repaired.view(-1, 4).sum(1).tolist() == [2, 2]
