"""What training learns from: the same gradients whatever a step is split into, and refusals."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from spp_fx.errors import UsageError
from spp_fx.verbs.settings import TrainSettings
from spp_fx.verbs.train import Trained, train
from tests.command import command, must, one_line, randomize, save_tokenizer
from tests.effort import nightly
from tests.families import make_model


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


ROWS = ["a b c d e f g h i j", "k l", "m n o", "a c e g i k m o q", "b d f h", "p q r s t u"]


@pytest.fixture
def here(shallow, monkeypatch):
    """Adapter folders with factors that are not zero, and instructions of several lengths."""
    monkeypatch.chdir(shallow)
    randomize(shallow / "adapter")
    lines = (f'{{"instruction": "{row}", "output": "{row[::-1]}"}}' for row in ROWS)
    (shallow / "data.jsonl").write_text("\n".join(lines))
    return shallow


def learn(*, teacher: str | None = "dense", **settings) -> tuple[list[dict[str, Tensor]], Trained]:
    """The gradients of two steps over four rows each, and what training says."""
    gradients = Gradients()
    shutil.copytree("adapter", "trained", dirs_exist_ok=True)
    done = train(
        "trained", "data.jsonl",
        TrainSettings(**{"steps": 2, "batch_size": 4, "seq_len": 64, "clip": 0.0, "lr": 1e-9} | settings),
        teacher=teacher, callbacks=[gradients],
    )  # fmt: skip
    assert len(gradients.steps) == 2
    return gradients.steps, done


def assert_same(ones: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.abs().max() > 0
            torch.testing.assert_close(
                other[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()) + 1e-9
            )


GOALS = {
    "teacher": {},
    "mixed": {"teacher_weight": 0.5, "temperature": 2.0},
    "text and hidden": {"teacher_weight": 0.0, "match_hidden": 1.0},
    "all": {"teacher_weight": 0.67, "temperature": 2.0, "match_hidden": 0.5},
}


@pytest.mark.parametrize("goal", [nightly(goal) if goal == "mixed" else goal for goal in GOALS])
def test_gradients_do_not_depend_on_the_batches_that_a_step_is_split_into(here, goal):
    whole, one = learn(**GOALS[goal])
    parts, four = learn(**GOALS[goal], batch_size=1, accumulate=4)
    assert_same(whole, parts)
    assert four.loss == pytest.approx(one.loss, rel=1e-4)
    for name, part in one.parts.items():
        assert four.parts[name] == (None if part is None else pytest.approx(part, rel=1e-4)), name


def test_the_loss_is_the_sum_of_its_weighted_parts(here):
    _, done = learn(**GOALS["all"])
    text, teacher, hidden = (done.parts[name] for name in ("text", "teacher", "hidden"))
    assert min(text, teacher, hidden) > 0
    assert done.loss == pytest.approx(0.33 * text + 0.67 * teacher + 0.5 * hidden, rel=1e-4)
    _, plain = learn(teacher=None)
    assert plain.parts == {"text": pytest.approx(text, rel=1e-4), "teacher": None, "hidden": None}
    assert plain.loss == pytest.approx(plain.parts["text"], rel=1e-4)


def test_a_teacher_of_no_weight_is_refused(here):
    with pytest.raises(UsageError, match="learns nothing from --teacher"):
        learn(teacher_weight=0.0)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "packed"])
def test_ways_to_save_memory_do_not_change_what_is_compared(here, option):
    plain, _ = learn(**GOALS["all"])
    saved, _ = learn(**GOALS["all"], **{option: True})
    for one, other in zip(plain, saved, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())


def test_hidden_states_alone_reach_zero_where_the_student_is_the_teacher(here):
    _, done = learn(teacher="adapter", match_hidden=1.0)
    assert done.parts["hidden"] == pytest.approx(0, abs=1e-9)
    assert done.parts["teacher"] == pytest.approx(0, abs=1e-6)


LINE = (
    "train",
    "adapter",
    "--data",
    "data.jsonl",
    "--steps",
    1,
    "--seq-len",
    64,
    "--no-lr-trials",
    "--teacher",
)


def test_a_teacher_that_is_pruned_itself_is_said(here):
    must("teach", "sparse", "--data", "data.jsonl", "--seq-len", 64, "-o", "taught", "-q")
    shutil.copytree(here / "sparse", here / "copy")
    for teacher, is_sparse in (("copy", True), ("adapter", True), ("taught", True), ("dense", False)):
        assert ("is as sparse as the model being trained" in must(*LINE, teacher).err) == is_sparse, teacher


def test_a_teacher_of_another_tokenizer_is_refused(here):
    path = here / "dense" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 0', '"b": 0').replace('"b": 1', '"a": 1'))
    result = command(*LINE, "dense", "-q")
    assert result.code == 2
    assert "token 0 is 'b', the student's is 'a'; a teacher must share the tokenizer" in one_line(result.err)


def test_a_start_that_nothing_betters_is_kept_by_default(here):
    """`folded` predicts what the adapter does, and Adam moves a factor by the rate however small its gradient is."""
    must("merge", "adapter", "-o", "folded", "-q")
    settings = TrainSettings(steps=8, batch_size=4, seq_len=64)
    ends = []
    for trials in (False, True):
        shutil.copytree("adapter", "trained", dirs_exist_ok=True)
        ends.append(train("trained", "data.jsonl", replace(settings, lr_trials=trials), teacher="folded"))
    suggested, default = ends
    assert suggested.lr == max(default.lr_trials) > default.lr == min(default.lr_trials)
    assert default.losses[-1] < 0.1 * suggested.losses[-1]


@pytest.mark.parametrize("option", ["--teacher-weight", "--temperature", "--match-hidden"])
def test_settings_of_a_teacher_need_one(here, option):
    result = command("train", "adapter", "--data", "data.jsonl", "--steps", 1, option, 0.5)
    assert result.code == 2
    assert f"{option} needs --teacher" in one_line(result.err)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--teacher-weight", 1.5], "--teacher-weight must be 0 to 1"),
        (["--temperature", 0], "--temperature must be positive"),
        (["--match-hidden", -1], "--match-hidden must be"),
    ],
)
def test_weights_out_of_range_are_refused(here, options, word):
    result = command("train", "adapter", "--data", "data.jsonl", "--teacher", "dense", *options)
    assert result.code == 2
    assert word in one_line(result.err)


def test_layers_are_only_compared_with_as_many_of_the_same_width(here):
    make_model("llama").save_pretrained(here / "deep")
    save_tokenizer(here / "deep")
    line = (*LINE, "deep", "-q")
    result = command(*line, "--match-hidden", 1)
    assert result.code == 2
    assert "2 layers of width 32, the student 1 layers of width 32" in one_line(result.err)
    assert command(*line).code == 0
