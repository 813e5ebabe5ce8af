"""Training an adapter folder: resumable to the bit, no pickle, all or nothing."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from spp_fx.errors import UsageError, notes_of
from spp_fx.verbs import train as verb
from spp_fx.verbs.settings import TrainSettings
from tests.command import command
from tests.worlds import assert_untouched, made_once

STEPS = 8


@pytest.fixture
def adapter(made_shallow, tmp_path) -> Path:
    return shutil.copytree(made_shallow / "adapter", tmp_path / "adapter")


@pytest.fixture
def text_file(made_shallow) -> Path:
    return made_shallow / "text.txt"


def train(adapter: Path, text: Path, *more: object):
    line = ("train", adapter, "--data", text, "--seq-len", 32, "--batch-size", 4, "--steps", STEPS, "-q")
    return command(*line, *more)


def trained(factory: pytest.TempPathFactory, made: Path, name: str, *more: object) -> Path:
    """The folder of a run, once for all tests: adapter/ with its checkpoints, and report.json."""

    def make(root: Path) -> None:
        shutil.copytree(made / "adapter", root / "adapter")
        ran = train(root / "adapter", made / "text.txt", *more, "--json")
        assert ran.code == 0, ran.err
        (root / "report.json").write_text(ran.out)

    return made_once(factory, name, make)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made_shallow) -> Iterator[Path]:
    """A run with two checkpoints."""
    folder = trained(
        tmp_path_factory,
        made_shallow,
        "whole",
        "--save-steps",
        STEPS // 2,
        "--eval-data",
        made_shallow / "text.txt",
    )
    yield folder
    assert_untouched(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory, made_shallow) -> Iterator[Path]:
    """The shortest run that has trials of rates, with two checkpoints."""
    folder = trained(tmp_path_factory, made_shallow, "found", "--steps", 32, "--save-steps", 16)
    yield folder
    assert_untouched(folder)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def resumable(folder: Path, tmp_path: Path, start: bytes) -> Path:
    """A copy of a run's adapter as if it had been killed before it wrote its result."""
    adapter = shutil.copytree(folder / "adapter", tmp_path / "killed")
    (adapter / "adapter_model.safetensors").write_bytes(start)
    return adapter


def factors(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def test_training_lowers_the_perplexity_and_the_same_seed_gives_the_same_bytes(whole, adapter, text_file):
    report = report_of(whole)
    assert report["perplexity"] < report["perplexity_before"]
    assert report["steps"] == STEPS
    assert train(adapter, text_file).code == 0
    assert factors(adapter) == factors(whole / "adapter")


def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(whole, adapter, text_file, tmp_path):
    killed = resumable(whole, tmp_path, factors(adapter))
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    # As if it had been killed while it wrote the second checkpoint: that one is cut, and there is no result.
    cut = killed / "checkpoint-8" / "optimizer.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (killed / "checkpoint-8" / "finished.json").unlink()
    merged = command("merge", killed, "-o", tmp_path / "merged").err
    assert "its training was stopped after checkpoint-4" in merged
    resumed = train(killed, text_file, "--save-steps", 4, "--resume", "--json").json
    assert "stopped" not in command("merge", killed, "-o", tmp_path / "merged", "--force").err
    assert factors(killed) == factors(whole / "adapter")
    first = report_of(whole)
    assert (resumed["loss"], resumed["loss_parts"]) == (first["loss"], first["loss_parts"])
    refused = train(killed, text_file, "--resume", "--lr", 0.5)
    assert refused.code == 2
    assert "which a resumed run keeps; 0.5 needs a new run" in refused.err
    line = ("--data", text_file, "--seq-len", 32, "--batch-size", 4, "--steps", STEPS + 1)
    changes = command("train", killed, *line, "--resume").err
    assert "checkpoint-8: the run continues with steps 9 instead of 8;" in changes


def test_a_run_killed_after_its_last_checkpoint_is_finished_without_a_further_step(
    whole, adapter, text_file, tmp_path
):
    first = report_of(whole)
    killed = resumable(whole, tmp_path, factors(adapter))
    again = train(killed, text_file, "--save-steps", 4, "--resume", "--json").json
    same = ("steps", "loss", "loss_parts", "losses")
    assert [again[key] for key in same] == [first[key] for key in same]
    assert factors(killed) == factors(whole / "adapter")


def test_an_interrupted_run_says_which_checkpoint_it_can_continue_from(adapter, text_file):
    class Interrupt(TrainerCallback):
        def on_save(self, *args, **kwargs):
            raise KeyboardInterrupt

    settings = TrainSettings(steps=3, seq_len=32, batch_size=4, lr=0.01, save_steps=2)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        verb.train(adapter, text_file, settings, callbacks=[Interrupt()])
    (note,) = notes_of(interrupted.value)
    assert "checkpoint-2 is kept: the same command with --resume continues there" in note


def test_the_last_report_holds_the_last_step(adapter, text_file):
    report = train(adapter, text_file, "--steps", 3, "--logging-steps", 2, "--no-lr-trials", "--json").json
    assert len(report["losses"]) == 2


def test_checkpoints_hold_no_pickle(whole):
    files = [p for p in (whole / "adapter" / "checkpoint-4").rglob("*") if p.is_file()]
    assert files
    assert {p.suffix for p in files} <= {".json", ".safetensors"}


def test_a_run_that_diverges_leaves_the_adapter_as_it_was(adapter, text_file):
    before = factors(adapter)
    ran = train(adapter, text_file, "--lr", "1e30")
    assert ran.code == 1
    assert "factors hold NaN or infinity (first: model.layers.0." in ran.err
    assert "--lr" in ran.err
    assert factors(adapter) == before


def test_a_teacher_of_another_vocabulary_is_refused_and_checkpoints_stay(whole, text_file, tmp_path):
    from tests.families import make_model

    adapter = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    other = make_model("llama", one_layer=True)
    other.resize_token_embeddings(100)
    other.save_pretrained(tmp_path / "other")
    ran = train(adapter, text_file, "--teacher", tmp_path / "other", "--force")
    assert ran.code == 2
    assert "vocabulary" in ran.err
    assert (adapter / "checkpoint-4").is_dir()


def test_a_teacher_changes_what_is_learned(whole, adapter, made_shallow, text_file):
    assert train(adapter, text_file, "--no-lr-trials", "--teacher", made_shallow / "dense").code == 0
    plain, taught = (
        load_file(folder / "adapter_model.safetensors") for folder in (whole / "adapter", adapter)
    )
    assert any(not plain[name].equal(taught[name]) for name in plain)


def test_resume_without_a_checkpoint_is_refused(adapter, text_file):
    ran = train(adapter, text_file, "--resume")
    assert ran.code == 2
    assert "--save-steps" in ran.err


def test_the_default_rate_given_by_hand_is_the_same_run(whole, adapter, text_file):
    assert train(adapter, text_file, "--lr", repr(report_of(whole)["lr"])).code == 0
    assert factors(adapter) == factors(whole / "adapter")


def test_epochs_get_the_rate_of_their_steps(adapter, text_file, tmp_path):
    shutil.copytree(adapter, tmp_path / "again")
    line = ("--data", text_file, "--seq-len", 32, "--batch-size", 3, "--accumulate", 2, "--no-lr-trials")
    line += ("--json", "-q")
    epochs = command("train", adapter, *line, "--epochs", 1.5).json
    steps = command("train", tmp_path / "again", *line, "--steps", epochs["steps"]).json
    assert epochs["lr"] == steps["lr"]


def test_short_trials_choose_the_rate_and_leave_no_trace(found, adapter, text_file):
    report = report_of(found)
    tried = {each["lr"]: each["loss"] for each in report["lr_trials"]}
    assert 3 <= len(tried) <= 7
    assert (
        -1.4 < math.log2(report["lr"] / min(tried, key=tried.__getitem__)) < 0.6
    )  # (10 / 32)^0.45 is 2^-0.75
    given = train(adapter, text_file, "--steps", 32, "--lr", report["lr"], "--json").json
    assert given["lr_trials"] == []
    assert report["lr_trial_seconds"] > 0 == given["lr_trial_seconds"]
    assert factors(adapter) == factors(found / "adapter")


def test_without_trials_the_rate_is_the_suggestion(adapter, text_file):
    report = train(adapter, text_file, "--steps", 33, "--no-lr-trials", "--json").json
    assert report["lr_trials"] == []
    assert report["lr"] > 0


def test_a_resumed_run_keeps_the_rate_that_was_found(found, adapter, text_file, tmp_path):
    killed = resumable(found, tmp_path, factors(adapter))
    shutil.rmtree(killed / "checkpoint-32")
    again = train(killed, text_file, "--steps", 32, "--save-steps", 16, "--resume", "--json").json
    assert (again["lr"], again["lr_trials"]) == (report_of(found)["lr"], [])
    assert factors(killed) == factors(found / "adapter")


def test_trials_warm_up_for_the_runs_share_of_steps_and_have_no_lowest_rate(adapter, text_file, monkeypatch):
    trials = []

    def stop(adapter, loaded, read, settings, *others):
        trials.append(settings)
        raise UsageError("stopped")

    monkeypatch.setattr(verb, "_trainer", stop)
    line = ("--steps", 32, "--warmup", 24, "--schedule", "cosine", "--min-lr", 0.9)
    assert "stopped" in train(adapter, text_file, *line).err
    assert [(each.steps, each.warmup, each.min_lr) for each in trials] == [(10, 0.75, 0.0)]


def test_a_lowest_rate_above_the_one_that_is_found_is_refused(adapter, text_file):
    before = factors(adapter)
    ran = train(adapter, text_file, "--no-lr-trials", "--schedule", "cosine", "--min-lr", 0.9)
    assert ran.code == 2
    assert "--min-lr 0.9 is above the learning rate of this run" in ran.err
    assert factors(adapter) == before


def test_evaluation_before_and_after_is_in_the_same_precision(adapter, text_file):
    line = ("--steps", 1, "--lr", 1e-12, "--bf16", "--eval-data", text_file, "--json")
    report = train(adapter, text_file, *line).json
    assert report["perplexity_before"] == report["perplexity"]


def test_a_run_of_fewer_steps_than_a_report_says_its_loss_once(adapter, text_file):
    line = ("--data", text_file, "--seq-len", 32, "--batch-size", 8, "--epochs", 1, "--lr", 0.01, "-q")
    ran = command("train", adapter, *line)
    assert ran.code == 0, ran.err
    assert "on average" in ran.out
    assert "at the end" not in ran.out
