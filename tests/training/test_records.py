"""Rows of files and datasets as samples: the keys of public sets, what is skipped, what is refused."""

import importlib.machinery
import json
import sys
import types

import pytest

from spp_fx.errors import UsageError
from spp_fx.training.records import Chat, Instruction, Text, read_samples


def read(tmp_path, *rows, strict=False):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_samples(path, strict=strict)


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

INSTRUCTIONS = {
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "alpaca-null-input": {"instruction": "a", "input": None, "output": "b", "text": "the template filled in"},
    "alpaca-response": {"instruction": "a", "input": "", "response": "b"},
    "dolly": {"instruction": "a", "context": "", "response": "b", "category": "open_qa"},
    "completion": {"prompt": "a", "completion": "b"},
    "prompt-response": {"prompt": "a", "response": "b"},
    "gsm8k": {"question": "a", "answer": "b"},
    "metamath": {"type": "x", "query": "a", "original_question": "c", "response": "b"},
    "open-orca": {"id": "1", "system_prompt": "", "question": "a", "response": "b"},
    "empty-instruction": {"instruction": "", "input": "a", "output": "b"},
}


@pytest.mark.parametrize("row", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_prompts_and_answers_are_read_by_the_keys_of_public_sets(tmp_path, row):
    (sample,) = read(tmp_path, row).samples
    assert isinstance(sample, Instruction)
    assert sample.prompt.endswith("### Instruction:\na\n\n### Response:\n")
    assert sample.answer == "b"


@pytest.mark.parametrize("key", ["input", "context"])
def test_an_input_or_context_has_its_place_in_the_prompt(tmp_path, key):
    (sample,) = read(tmp_path, {"instruction": "a", key: "given", "output": "b"}).samples
    assert "### Instruction:\na\n\n### Input:\ngiven\n\n### Response:\n" in sample.prompt


def test_a_system_prompt_stands_before_the_question(tmp_path):
    (sample,) = read(tmp_path, {"system_prompt": "be brief", "question": "a", "response": "b"}).samples
    assert "### Instruction:\nbe brief\n\na\n\n" in sample.prompt


PLAIN = (("user", "a"), ("assistant", "b"))
CHATS = {
    "openai": ({"messages": [USER, ANSWER]}, PLAIN),
    "ultrachat": ({"prompt": "a", "prompt_id": "1", "messages": [USER, ANSWER]}, PLAIN),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, PLAIN),
    "slim-orca": (
        {"conversations": [
            {"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "a", "weight": 0},
            {"from": "gpt", "value": "b", "weight": 1},
        ]},
        (("system", "s"), *PLAIN),
    ),
    "open-hermes": (
        {"system_prompt": None, "source": "x", "conversations": [
            {"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
        ]},
        PLAIN,
    ),
    "wildchat": ({"conversation": [USER, ANSWER]}, PLAIN),
    "bot": ({"conversations": [{"from": "user", "value": "a"}, {"from": "bot", "value": "b"}]}, PLAIN),
    "chatgpt": ({"conversations": [{"from": "Human", "value": "a"}, {"from": "ChatGPT", "value": "b"}]}, PLAIN),
    "trl": ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
    "tools": (
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"},
        ]},
        (("user", "a"), ("assistant", "f()"), ("tool", "1"), ("assistant", "b")),
    ),
    "function": (
        {"messages": turns(("user", "a"), ("assistant", "f()"), ("function", "1"), ("assistant", "b"))},
        (("user", "a"), ("assistant", "f()"), ("tool", "1"), ("assistant", "b")),
    ),
    "parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b", "image": None}, "c"]},
        ]},
        (("user", "a"), ("assistant", "bc")),
    ),
    "ends-with-the-user": ({"messages": [USER, ANSWER, USER]}, (*PLAIN, ("user", "a"))),
    "several-turns": ({"messages": [USER, ANSWER] * 3}, PLAIN * 3),
    "null-user": ({"messages": [{"role": "user", "content": None}, ANSWER]}, (("user", ""), ("assistant", "b"))),
    "system-beside": ({"system": "s", "conversations": [USER, ANSWER]}, (("system", "s"), *PLAIN)),
}  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), CHATS.values(), ids=CHATS)
def test_chats_are_read_by_the_keys_and_roles_of_public_sets(tmp_path, row, messages):
    (sample,) = read(tmp_path, row).samples
    assert isinstance(sample, Chat)
    assert [(message["role"], message["content"]) for message in sample.messages] == list(messages)


@pytest.mark.parametrize(
    "row",
    [{"text": "a"}, {"text": "a", "timestamp": "t", "url": "u"}, {"message_id": "1", "text": "a", "role": "prompter"}],
    ids=["wikitext", "c4", "open-assistant"],
)  # fmt: skip
def test_text_is_read(tmp_path, row):
    (sample,) = read(tmp_path, row).samples
    assert isinstance(sample, Text)
    assert sample.text == "a"


EMPTY = {
    "alpaca": ({"instruction": "a", "input": "c", "output": ""}, "output is empty"),
    "null-answer": ({"instruction": "a", "output": None}, "output is empty"),
    "blank-answer": ({"question": "a", "answer": " \n"}, "answer is empty"),
    "no-prompt": ({"prompt": "", "completion": "b"}, "prompt is empty"),
    "wikitext": ({"text": ""}, "text is empty"),
    "wikitext-blank": ({"text": " \n"}, "text is empty"),
    "null-text": ({"text": None}, "text is empty"),
    "no-messages": ({"messages": []}, "messages is empty"),
    "null-conversations": ({"conversations": None}, "conversations is empty"),
    "system-only": ({"messages": turns(("system", "s"))}, "no message is the assistant's"),
    "user-only": ({"conversations": [{"from": "human", "value": "a"}]}, "no message is the assistant's"),
    "silent-assistant": ({"messages": [USER, {"role": "assistant", "content": None}]}, "assistant is empty"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        "message 0 has a part of type 'image_url'",
    ),
    "tool-calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, ANSWER]},
        "message 1 calls tools",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), EMPTY.values(), ids=EMPTY)
def test_rows_with_nothing_to_learn_are_skipped_counted_and_named(tmp_path, row, reason):
    found = read(tmp_path, {"text": "kept"}, row, row)
    assert [sample.where.rpartition(", ")[2] for sample in found.samples] == ["line 1"]
    assert (found.skipped.count, found.skipped.rows) == (2, 3)
    line = found.skipped.line("data.jsonl")
    assert "2 of 3 rows" in line
    assert "line 2" in line
    assert reason in line


@pytest.mark.parametrize(("row", "reason"), EMPTY.values(), ids=EMPTY)
def test_strict_data_refuses_such_a_row_by_its_line(tmp_path, row, reason):
    with pytest.raises(UsageError, match="line 2") as raised:
        read(tmp_path, {"text": "kept"}, row, strict=True)
    assert reason in str(raised.value)


@pytest.mark.parametrize(("row", "reason"), EMPTY.values(), ids=EMPTY)
def test_data_without_a_single_usable_row_is_an_error(tmp_path, row, reason):
    with pytest.raises(UsageError, match="none of the 2 rows") as raised:
        read(tmp_path, row, row)
    assert reason in str(raised.value)


MALFORMED = {
    "no-json": '{"text": ',
    "nested-too-deep": "[" * 100_000,
    "list": ["a"],
    "number": 3,
    "unknown-key": {"txt": "a"},
    "no-key": {},
    "no-answer-key": {"instruction": "a"},
    "answer-that-is-no-text": {"instruction": "a", "output": 3},
    "text-that-is-no-text": {"text": ["a"]},
    "messages-that-are-no-list": {"messages": "a"},
    "message-that-is-no-record": {"messages": ["a"]},
    "unknown-role": {"messages": [{"role": "king", "content": "a"}]},
    "no-role": {"messages": [{"content": "a"}]},
    "content-that-is-no-text": {"messages": [{"role": "user", "content": 3}, ANSWER]},
    "part-that-is-no-record": {"messages": [{"role": "user", "content": [3]}, ANSWER]},
}


@pytest.mark.parametrize("row", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_an_error_that_names_its_line(tmp_path, row):
    with pytest.raises(UsageError, match=r"data\.jsonl, line 2"):
        read(tmp_path, {"text": "kept"}, row)


def test_items_of_a_json_file_are_rows_too(tmp_path):
    (tmp_path / "data.JSON").write_text(json.dumps([{"text": ""}, {"text": "a"}]))
    found = read_samples(tmp_path / "data.JSON")
    assert [sample.text for sample in found.samples] == ["a"]
    assert "item 0" in found.skipped.line("data.JSON")


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "teknium/OpenHermes-2.5", "wikitext"])
def test_datasets_of_the_hub_are_read_by_name(monkeypatch, tmp_path, name):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return [
            {"instruction": "a", "input": "", "output": ""},
            {"instruction": "a", "input": "", "output": "b"},
        ]

    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    found = read_samples(name)
    assert asked == [(name, "train")]
    assert [sample.answer for sample in found.samples] == ["b"]
    assert "row 0: output is empty" in found.skipped.line(name)
