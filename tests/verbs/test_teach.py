"""A teacher's sampled tokens: written whole or resumed, trained on like the teacher, refused for another text."""

import json
import shutil

import pytest
import torch

import spp_fx
from spp_fx.errors import UsageError
from spp_fx.training.samples import training_rows
from spp_fx.training.teacher_cache import TaughtRows, TeacherCache
from spp_fx.verbs import teach as verb
from spp_fx.verbs.load import load_tokenizer
from tests.command import command, listing, must, one_line, randomize, rewrite, tensors

ROWS = ["a b c d e f g h i j", "k l", "m n o", "a c e g i k m o q", "b d f h", "p q r s t u"]


@pytest.fixture
def here(shallow, monkeypatch):
    """Adapter folders with factors that are not zero, and instructions of several lengths."""
    monkeypatch.chdir(shallow)
    randomize(shallow / "adapter")
    lines = (json.dumps({"instruction": row, "output": row[::-1]}) for row in ROWS)
    (shallow / "data.jsonl").write_text("\n".join(lines))
    return shallow


TEACH = ["teach", "dense", "--data", "data.jsonl", "--seq-len", 64, "-o", "taught"]


def trained(*options: object) -> dict:
    """The report of two steps from the same start each time."""
    shutil.copytree("adapter", "trained", dirs_exist_ok=True)
    line = [
        "train",
        "trained",
        "--data",
        "data.jsonl",
        "--steps",
        2,
        "--batch-size",
        3,
        "--lr",
        1e-3,
        "--clip",
        0,
    ]
    return must(*line, *options, "--json", "-q").json


@pytest.mark.parametrize("options", ["", "--loss-on answer --packing", "--temperature 2"])
def test_training_on_many_samples_is_training_with_the_teacher(here, options):
    form = [word for word in options.split() if word not in ("--temperature", "2")]
    report = must(*TEACH, *options.split(), "--samples", 40_000, "--json", "-q").json
    assert report["bytes"] == sum(path.stat().st_size for path in (here / "taught").iterdir())
    sampled = trained("--teacher", "taught", "--teacher-weight", 0.5, *form)
    exact = trained("--teacher", "dense", "--teacher-weight", 0.5, "--seq-len", 64, *options.split())
    assert sampled["seq_len"] == 64
    for part in ("text", "teacher"):
        assert sampled["loss_parts"][part] == pytest.approx(exact["loss_parts"][part], abs=2e-5), part


def test_a_row_holds_what_the_teacher_says_at_the_tokens_that_are_learned(here):
    form = {"loss_on": "answer", "packing": False}
    done = spp_fx.teach("dense", "taught", "data.jsonl", seq_len=64, samples=200, **form)
    tokenizer, program = (
        load_tokenizer(here / "dense"),
        spp_fx.load_program("dense").program.requires_grad_(False),
    )
    rows, _ = training_rows("data.jsonl", tokenizer, 64, **form)
    taught = TaughtRows(rows, TeacherCache.open(here / "taught"))
    assert len(taught) == len(ROWS)
    entropies = []
    for index in range(len(taught)):
        row = taught[index]
        probabilities = program(row["input_ids"][None]).logits[0].softmax(-1)
        shares = torch.zeros_like(probabilities)
        for position, (tokens, counts) in enumerate(zip(row["draws"], row["counts"], strict=True)):
            shares[position].index_add_(0, tokens, counts / 200)
        learned = torch.zeros(len(row["labels"]), dtype=torch.bool)
        learned[:-1] = row["labels"][1:] != -100
        assert torch.equal(row["counts"].sum(-1) > 0, learned)
        assert ((shares - probabilities).abs()[learned] < 1 / 200 + 1e-5).all()
        entropy = torch.distributions.Categorical(probabilities[learned]).entropy()
        torch.testing.assert_close(row["entropy"][learned], entropy, rtol=1e-4, atol=1e-4)
        entropies.append(entropy)
    assert done.manifest.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
    assert done.manifest.text.positions == len(torch.cat(entropies))


def test_samples_of_one_row_do_not_depend_on_the_batch_and_batches_add_up(here):
    must(*TEACH, "--batch-size", 1, "-q")
    must(*TEACH[:-1], "other", "-q")
    ours, theirs = (tensors(here / folder) for folder in ("taught", "other"))
    assert torch.equal(ours["tokens"].long(), theirs["tokens"].long())
    assert torch.equal(ours["counts"], theirs["counts"])
    whole = trained("--teacher", "taught")
    parts = trained("--teacher", "taught", "--batch-size", 1, "--accumulate", 3)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_text_is_cut_into_the_same_windows_in_every_epoch(here):
    must("teach", "dense", "--data", "text.txt", "--seq-len", 16, "-o", "taught", "-q")
    text = json.loads((here / "taught" / "teacher.json").read_text())["text"]
    line = [
        "train",
        "adapter",
        "--data",
        "text.txt",
        "--teacher",
        "taught",
        "--batch-size",
        4,
        "--no-lr-trials",
        "--json",
        "-q",
    ]
    report = must(*line, "--epochs", 2).json
    assert report["seq_len"] == 16
    assert report["steps"] == 2 * -(-text["rows"] // 4)
    assert text["positions"] == text["rows"] * 15


def test_an_interrupted_run_continues_with_the_same_bytes(here, monkeypatch):
    monkeypatch.setattr(verb, "FILE_PAIRS", 32 * 50)
    must(*TEACH, "-q")
    whole = listing(here / "taught")
    assert len(whole) > 3
    predicted = []

    def tick(done: int, total: int | None, item: str) -> None:
        predicted.append(item)
        if done == 4:
            raise KeyboardInterrupt

    settings = {"seq_len": 64, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        spp_fx.teach("dense", "again", "data.jsonl", **settings, tick=tick)
    assert not (here / "again").exists()
    begun = set(predicted)
    predicted.clear()
    spp_fx.teach(
        "dense", "again", "data.jsonl", **settings, tick=lambda done, total, item: predicted.append(item)
    )
    assert begun - set(predicted), "a finished file was written again"
    assert listing(here / "again") == whole


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ("", ["--seq-len", 32], ["--seq-len 64", "32"]),
        ("", ["--loss-on", "answer"], ["--loss-on all", "answer"]),
        ("", ["--packing"], ["--packing False", "True"]),
        ("text", [], ["data.jsonl (6 rows", "data.jsonl (5 rows"]),
        ("", ["--temperature", 2], ["temperature of 1", "is 2"]),
        ("", ["--match-hidden", 1], ["--match-hidden needs the teacher itself"]),
        ("tokenizer", [], ["a tokenizer whose vocabulary"]),
    ],
)
def test_a_cache_of_something_else_is_refused(here, change, options, words):
    must(*TEACH, "-q")
    if change == "text":
        (here / "data.jsonl").write_text("\n".join((here / "data.jsonl").read_text().splitlines()[1:]))
    if change == "tokenizer":
        path = here / "sparse" / "tokenizer.json"
        content = json.loads(path.read_text())
        words_of = content["model"]["vocab"]
        words_of["a"], words_of["z"] = words_of["z"], words_of["a"]
        path.write_text(json.dumps(content))
    ran = command(
        "train", "adapter", "--data", "data.jsonl", "--teacher", "taught", "--steps", 1, "-q", *options
    )
    assert ran.code == 2
    for word in words:
        assert word in one_line(ran.err)


def test_a_damaged_cache_is_refused(here):
    must(*TEACH, "-q")
    path = here / "taught" / "tokens-00000.safetensors"
    line = ["train", "adapter", "--data", "data.jsonl", "--teacher", "taught", "--steps", 1, "-q"]
    rewrite(path, lambda held: held.update(counts=held["counts"] + 1))
    ran = command(*line)
    assert ran.code == 1
    assert "does not have 32 samples at each position" in one_line(ran.err)
    rewrite(path, lambda held: held.update(entropy=held["entropy"][1:]))
    assert "its tensors are not those that teacher.json lists" in one_line(command(*line).err)
    path.unlink()
    assert "tokens-00000.safetensors" in one_line(command(*line).err)
    (here / "taught" / "teacher.json").write_text("{}")
    assert "teacher.json" in one_line(command(*line).err)


def test_an_output_that_exists_is_kept_without_force(here):
    must(*TEACH, "-q")
    assert "--force" in one_line(command(*TEACH, "-q").err)
    must(*TEACH, "-q", "--force")
    with pytest.raises(UsageError, match="samples must be 1 to 65535"):
        spp_fx.teach("dense", "other", "data.jsonl", samples=2**16)
