"""The learning rate that train takes by itself: the size of weights, and the search around a suggestion."""

from math import inf, log2, nan

import pytest
import torch
from safetensors.torch import save_file

from spp_fx.storage.folder import ModelFolder
from spp_fx.verbs.rate import (
    LOWEST,
    MOST_TRIALS,
    Trial,
    best_multiple,
    carried_over,
    find,
    spread,
    trial_steps,
    warmup_share,
)


@pytest.mark.parametrize("best", [0.11, 0.7, 1.0, 1.3, 9.0])
def test_the_lowest_point_of_a_parabola_is_found(best):
    found = best_multiple(lambda multiple: 3 + 0.1 * log2(multiple / best) ** 2)
    assert found == pytest.approx(best)


@pytest.mark.parametrize("bad", [inf, nan])
def test_rates_that_diverge_are_left(bad):
    found = best_multiple(lambda multiple: bad if multiple > 0.3 else 1 / multiple)
    assert found == 0.25


def test_where_every_rate_diverges_the_search_ends():
    tried = []
    best_multiple(lambda multiple: tried.append(multiple) or inf)
    assert len(tried) == MOST_TRIALS


def test_a_loss_that_falls_for_ever_ends_the_search():
    tried = []
    found = best_multiple(lambda multiple: tried.append(multiple) or -multiple)
    assert len(tried) <= MOST_TRIALS
    assert found == max(tried) >= 8


@pytest.mark.parametrize("searches", [False, True])
def test_a_rate_that_ends_above_the_start_is_lowered(searches):
    found, trials = find(lambda multiple: Trial(multiple, -multiple, 0.05 - multiple), searches)
    assert found <= 0.05 < 4 * found
    assert len(trials) == len({trial.lr for trial in trials})


def test_a_rate_is_lowered_to_where_it_hardly_moves_a_factor_and_no_further():
    found, trials = find(lambda multiple: Trial(multiple, nan, nan), False)
    assert found == LOWEST
    assert len(trials) == 7


def test_a_good_suggestion_is_the_only_trial_of_a_short_run():
    found, trials = find(lambda multiple: Trial(multiple, 3.0, 0.0), False)
    assert (found, len(trials)) == (1, 1)


def test_a_flat_loss_keeps_the_suggestion():
    assert best_multiple(lambda multiple: 2.0) == 1


@pytest.mark.parametrize(
    ("left", "found"), [(1.2, 0.02), (1.0, 0.02), (0.5, 0.04), (0.0, 0.08), (nan, 0.02), (inf, 0.02)]
)
def test_a_rate_falls_with_the_steps_as_far_as_a_loss_is_left(left, found):
    assert carried_over(0.08, 0.02, left) == pytest.approx(found)


@pytest.mark.parametrize(("steps", "short"), [(1, 1), (31, 31), (32, 10), (100, 20), (100_000, 24)])
def test_a_trial_is_a_fifth_within_bounds_or_the_whole_of_a_short_run(steps, short):
    assert trial_steps(steps) == short


@pytest.mark.parametrize(("warmup", "share"), [(0.03, 0.03), (1, 0.01), (50, 0.5), (100, 0.99), (500, 0.99)])
def test_warmup_is_a_share_of_the_run(warmup, share):
    assert warmup_share(warmup, 100) == share


def test_the_spread_of_a_weight_is_that_of_its_non_zeros(tmp_path):
    weight = torch.zeros(64, 8, dtype=torch.bfloat16)
    weight[:32, ::2], weight[32:, ::4] = 3, -3
    (tmp_path / "config.json").write_text("{}")
    values = {"some": weight, "none": torch.zeros(4, 4), "stack": weight[None].clone()}
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    model = ModelFolder.open(tmp_path)
    assert [spread(model, name) for name in values] == [3, 1, 3]
