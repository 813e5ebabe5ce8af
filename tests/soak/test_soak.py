"""A few kills of each verb; `make soak` makes hundreds."""

import random
from pathlib import Path

import pytest

from tests.soak.jobs import jobs_of, make_models
from tests.soak.run import fork_server
from tests.soak.trial import Trials

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak") / "models"
    make_models(root, width=128, layers=2)
    return root


@pytest.mark.parametrize("verb", ["merge", "prune", "export"])
def test_a_killed_run_leaves_nothing_or_all_and_the_next_ends_as_if_undisturbed(
    verb: str, models: Path, tmp_path: Path
) -> None:
    job = jobs_of(verb, models)[0]
    tally = Trials.of(job, tmp_path / "runs", fork_server(), timed=False).until(2, random.Random(0))
    assert tally.broken == []
    assert sum(tally.kills.values()) == 2


def test_a_wrong_output_is_noticed(models: Path, tmp_path: Path) -> None:
    """The soak itself can fail."""
    trials = Trials.of(jobs_of("merge", models)[0], tmp_path / "runs", fork_server(), timed=False)
    trials.expected["config.json"] = "another digest"
    assert "the output is not the undisturbed one" in trials.until(1, random.Random(0)).broken[0]
