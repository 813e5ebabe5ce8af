"""Options of train: data of every form, and ways to run that must not change what is learned."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.command import command, must, one_line
from tests.effort import nightly

LINE = [
    "train",
    "adapter",
    "--data",
    "text.txt",
    "--seq-len",
    "16",
    "--batch-size",
    "4",
    "--steps",
    "4",
    "--no-lr-trials",
]
EVALUATED = [*LINE, "--eval-data", "text.txt"]


@pytest.fixture
def here(shallow, monkeypatch):
    monkeypatch.chdir(shallow)
    return shallow


def factors(world) -> dict[str, torch.Tensor]:
    return load_file(world / "adapter" / "adapter_model.safetensors")


def trained(world, *more: object) -> tuple[dict[str, torch.Tensor], dict]:
    """The factors after LINE with options, from the same start each time."""
    path = world / "adapter" / "adapter_model.safetensors"
    start = path.read_bytes()
    report = must(*LINE, *more, "--json", "-q").json
    found = factors(world)
    path.unlink()
    path.write_bytes(start)
    return found, report


@pytest.mark.parametrize("option", ["--packed", "--gradient-checkpointing"])
def test_saving_memory_changes_no_bit(here, option):
    plain, _ = trained(here)
    saved, _ = trained(here, option)
    for name, value in plain.items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("teacher", [[], nightly(["--teacher", "dense"])], ids=["text", "teacher"])
def test_accumulating_is_a_larger_batch(here, teacher):
    plain, whole = trained(here, "--warmup", 0, *teacher)
    halves, parts = trained(here, "--warmup", 0, "--batch-size", 2, "--accumulate", 2, *teacher)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    for name, value in plain.items():
        torch.testing.assert_close(halves[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_bfloat16_is_near(here):
    _, plain = trained(here)
    _, half = trained(here, "--bf16")
    assert abs(half["loss"] / plain["loss"] - 1) < 0.02


def test_clip_and_schedule_reach_the_optimizer(here):
    plain, _ = trained(here)
    for more in (["--clip", 1e-9, "--weight-decay", 0], ["--schedule", "constant"], ["--weight-decay", 1]):
        other, _ = trained(here, *more)
        assert any(not torch.equal(other[name], value) for name, value in plain.items()), more


def test_an_early_stop_keeps_the_best_factors(world, monkeypatch):
    monkeypatch.chdir(world)
    wild = must(
        *EVALUATED, "--steps", 12, "--lr", 30.0, "--eval-steps", 2, "--early-stop", 5, "--json", "-q"
    ).json
    alone = must(*EVALUATED, "--steps", 12, "--lr", 30.0, "--force", "--json", "-q").json
    assert wild["perplexity"] < alone["perplexity"]


def test_an_early_stop_comes_when_nothing_is_better(here):
    # So small a step moves no float32: the second and the third evaluation are what the first was.
    idle = ("--steps", 40, "--lr", 1e-30, "--weight-decay", 0, "--eval-steps", 2, "--early-stop", 2)
    assert must(*EVALUATED, *idle, "--json", "-q").json["steps"] == 6


def test_options_come_from_a_file_and_the_command_line_goes_before_it(here):
    (here / "run.yaml").write_text(
        "data: text.txt\nseq-len: 16\nbatch_size: 4\nsteps: 6\nschedule: constant\nlr-trials: false\n"
    )
    report = must("train", "adapter", "--config", "run.yaml", "--steps", 3, "--json", "-q").json
    assert (report["steps"], report["seq_len"]) == (3, 16)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("sequence: 3", "sequence"),
        ("- a", "name: value"),
        ("a: [", "YAML"),
        ("steps: many\ndata: text.txt", "many"),
    ],
)
def test_a_file_of_options_that_cannot_be_used_is_refused(here, content, word):
    (here / "run.yaml").write_text(content)
    result = command("train", "adapter", "--config", "run.yaml", "-q")
    assert result.code == 2
    assert word in result.err


ALPACA = [
    {"instruction": "a b c", "input": "d", "output": "e f"},
    {"instruction": "g h", "input": "", "output": "i j a b"},
    {"instruction": "c d e", "output": "f g"},
]
CHAT = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}]}] * 3
TEXT = [{"text": "a b c d e f g h i j " * 4}]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} </s> {% endfor %}"


@pytest.mark.parametrize(
    ("form", "kind", "options"),
    [
        ("json", "alpaca", ""),
        ("jsonl", "chat", "--packing"),
        nightly("json", "chat", "--loss-on answer"),
        nightly("jsonl", "alpaca", "--packing"),
        nightly("jsonl", "alpaca", "--loss-on answer"),
        nightly("jsonl", "chat", ""),
        ("json", "text", "--loss-on answer"),
        nightly("jsonl", "text", "--packing"),
        ("jsonl", "text", ""),
    ],
)
def test_records_are_learned_from(here, form, kind, options):
    records, more = {"alpaca": ALPACA, "chat": CHAT, "text": TEXT}[kind], options.split()
    path = here / f"data.{form}"
    path.write_text(json.dumps(records) if form == "json" else "\n".join(map(json.dumps, records)))
    config = here / "sparse" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    result = command(
        *[
            "train",
            "adapter",
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--seq-len",
            "64",
            "--no-lr-trials",
            "-q",
            "--json",
            "--data",
        ],
        path,
        *more,
    )
    if "text" in records[0] and more == ["--loss-on", "answer"]:
        assert result.code == 2
        assert "without answers" in one_line(result.err)
        return
    if "text" in records[0]:
        assert result.code == 2, "forty letters do not fill a window of 64"
        assert "do not fill a window" in one_line(result.err)
        return
    assert result.code == 0, result.err
    assert result.json["loss"] > 0


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"text": "a"}\n{"text": ', "line 2"),
        ('{"text": "a"}\n\n{"txt": "a"}', "line 3"),
        ('{"text": "a"}\n["a"]', "line 2"),
        ('{"instruction": "a"}', "output"),
        ('{"instruction": "a", "output": "b", "input": 3}', "input"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "chat template"),
        ("", "no record"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(here, content, word):
    (here / "data.jsonl").write_text(content)
    result = command(*["train", "adapter", "--steps", "2", "--seq-len", "16", "-q", "--data", "data.jsonl"])
    assert result.code == 2
    assert "data.jsonl" in one_line(result.err)
    assert word in result.err


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--schedule", "wavy"], "cosine"),
        (["--early-stop", 2], "--eval-steps"),
        (["--report-to", "nosuch"], "--report-to: nosuch is not supported"),
        (["--accumulate", 0], "--accumulate"),
        (["--clip", -1], "--clip"),
        (["--loss-on", "prompt"], "answer"),
        (["--seed", -1], "--seed"),
    ],
)
def test_wrong_options_are_refused(here, more, word):
    before = factors(here)
    result = command(*EVALUATED, *more, "-q")
    assert result.code == 2
    assert word in one_line(result.err)
    assert all(torch.equal(value, before[name]) for name, value in factors(here).items())


def test_evaluations_need_a_text(here):
    line = "train adapter --data text.txt --seq-len 16 --steps 2 --eval-steps 1 -q"
    result = command(*line.split())
    assert result.code == 2
    assert "--eval-data" in one_line(result.err)
