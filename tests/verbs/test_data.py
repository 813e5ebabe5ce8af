"""One reader of data for train, eval and prune: records mean the text in them, rows without any are counted."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from spp_fx.training.records import ALPACA, ALPACA_WITH_INPUT, SEPARATOR, read_samples
from spp_fx.training.samples import IGNORED, tokenize
from tests.command import command, must, one_line
from tests.effort import nightly

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} </s> {% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
)
EMPTY = {"instruction": "a", "input": "", "output": ""}
FULL = {"instruction": "a b c", "input": "", "output": "d e f g h i j a b c d e f g"}


@pytest.fixture
def here(shallow, monkeypatch):
    monkeypatch.chdir(shallow)
    return shallow


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def set_template(folder, template):
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))


def perplexity(data, *more):
    return must("eval", "sparse", "--data", data, "--seq-len", 16, "--json", "-q", *more).json["perplexity"]


INSTRUCTIONS = [FULL, {"instruction": "h i", "input": "j a", "output": "b c d e"}]
CASES = {
    "text": ([{"text": "a b c d e f g"}, {"text": "h i j a b"}], ["a b c d e f g", "h i j a b"]),
    "instructions": (
        INSTRUCTIONS,
        [
            ALPACA.format(instruction="a b c") + " " + FULL["output"],
            ALPACA_WITH_INPUT.format(instruction="h i", input="j a") + " b c d e",
        ],
    ),
    "chats": (
        [{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d e"}]}],
        ["u a b </s> a c d e </s>"],
    ),
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("text", "json"),
        ("instructions", "jsonl"),
        ("chats", "json"),
        nightly("text", "jsonl"),
        nightly("instructions", "json"),
        nightly("chats", "jsonl"),
    ],
)
def test_records_are_measured_as_the_text_in_them(here, kind, form):
    rows, documents = CASES[kind]
    set_template(here / "sparse", TEMPLATE)
    (here / "same.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    assert perplexity(write(here / f"data.{form}", rows)) == perplexity("same.txt")


def test_the_evaluation_data_of_train_is_what_eval_measures(here):
    data = write(here / "held.jsonl", [*INSTRUCTIONS, EMPTY])
    measure = ("eval", "adapter", "--data", data, "--seq-len", 16, "--json", "-q")
    line = f"train adapter --data text.txt --eval-data {data} --steps 1 --seq-len 16 --batch-size 2 --no-lr-trials -q"
    before, report, after = must(*measure).json, must(*line.split(), "--json").json, must(*measure).json
    assert report["perplexity_before"] == pytest.approx(before["perplexity"], rel=1e-6)
    assert report["perplexity"] == pytest.approx(after["perplexity"], rel=1e-6)
    assert (report["skipped_rows"], report["eval_skipped_rows"]) == (0, 1)


LINES = {
    "train": "train adapter --data {} --steps 1 --seq-len 64 --batch-size 2 --no-lr-trials",
    "eval": "eval sparse --data {} --seq-len 16",
    "prune": "prune dense -o new --method wanda --calib {} --samples 2 --seq-len 16",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_rows_with_nothing_in_them_are_counted_and_said_once(here, line):
    write(here / "data.jsonl", [FULL, EMPTY, FULL, EMPTY, EMPTY])
    done = must(*line.format("data.jsonl").split(), "--json")
    assert done.json["skipped_rows"] == 3
    (said,) = [text for text in done.err.splitlines() if "skipped" in text]
    assert "3 of 5 rows" in said
    assert "line 2: output is empty" in said


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_strict_data_refuses_such_rows_and_names_the_first(here, line):
    write(here / "data.json", [FULL, EMPTY])
    result = command(*line.format("data.json").split(), "--strict-data")
    assert result.code == 2
    assert "data.json, item 1: output is empty" in one_line(result.err)
    assert not (here / "new").exists()


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_data_without_a_usable_row_is_refused(here, line):
    write(here / "data.jsonl", [{"text": ""}, {"text": " \n"}])
    result = command(*line.format("data.jsonl").split())
    assert result.code == 2
    assert "none of the 2 rows" in one_line(result.err)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_dataset_of_the_hub_is_read_by_each_verb(here, line, monkeypatch):
    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    fake.load_dataset = lambda name, split: [FULL, EMPTY, FULL]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert must(*line.format("org/set").split(), "--json", "-q").json["skipped_rows"] == 1


def chats(here, template, *messages):
    set_template(here / "sparse", template)
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in messages]
    write(here / "chats.jsonl", rows)
    return AutoTokenizer.from_pretrained(here / "sparse"), read_samples(here / "chats.jsonl")


def test_a_chat_that_the_template_refuses_is_skipped_with_its_reason(here):
    good, bad = [("user", "a"), ("assistant", "b")], [("assistant", "a"), ("user", "b")]
    tokenizer, records = chats(here, ALTERNATING, good, bad)
    (sample,), skipped = tokenize(tokenizer, records, answer_only=True)
    assert tokenizer.decode(sample.ids) == "u a a b"
    assert "roles must alternate" in skipped.line("chats.jsonl")


def test_answers_alone_are_learned_of_a_chat_that_ends_with_the_user(here):
    said = [
        ("system", "c"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "d"),
        ("assistant", "e"),
        ("user", "f"),
    ]
    tokenizer, records = chats(here, TEMPLATE, said)
    (sample,), _ = tokenize(tokenizer, records, answer_only=True)
    learned = [i for i, label in zip(sample.ids, sample.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(sample.ids) == "s c </s> u a </s> a b </s> u d </s> a e </s> u f </s>"
    assert tokenizer.decode(learned) == "a b </s> a e </s>"


def test_a_template_that_rewrites_earlier_messages_learns_the_whole_text(here):
    last_alone = "{% for m in messages %}{{ m['content'] if loop.last else 'z' }} {% endfor %}"
    tokenizer, records = chats(here, last_alone, [("user", "a"), ("assistant", "b")] * 2)
    (sample,), _ = tokenize(tokenizer, records)
    assert torch.equal(torch.tensor(sample.ids), torch.tensor(sample.labels))
    write(
        here / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}],
    )
    line = "train adapter --data chats.jsonl --loss-on answer --steps 1 --seq-len 16 --no-lr-trials -q"
    assert "--loss-on all" in one_line(command(*line.split()).err)


def test_an_answer_beyond_the_rows_is_skipped_and_counted(here):
    write(here / "data.jsonl", [FULL, FULL | {"instruction": "a " * 200}])
    line = "train adapter --data data.jsonl --loss-on answer --steps 1 --seq-len 64 --batch-size 2 --no-lr-trials"
    done = must(*line.split(), "--json")
    assert done.json["skipped_rows"] == 1
    assert "raise --seq-len" in done.err
