"""Training samples from files: plain text, instructions (Alpaca's keys), chats, and datasets of the hub."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from spp_fx.errors import UsageError
from spp_fx.training.data import read_documents

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True)
class Text:
    """A document; all of it is learned."""

    text: str


@dataclass(frozen=True)
class Instruction:
    """A prompt in Alpaca's template, and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`, for the tokenizer's own template."""

    messages: tuple[dict[str, str], ...]


Sample = Text | Instruction | Chat


def read_samples(data: str | Path) -> list[Sample]:
    """The samples of a file (.json, .jsonl, anything else is text), or of a dataset of the hub.

    Raises:
        UsageError: nothing is there, or a record cannot be used; names the file and the line (.jsonl) or
            the item (.json).
    """
    path = Path(data)
    if not path.exists() and str(data).count("/") <= 1 and not path.suffix:
        return list(_hub(str(data)))
    if path.suffix == ".jsonl":
        return [_sample(record, where) for record, where in _lines(path)]
    if path.suffix == ".json":
        return [_sample(record, where) for record, where in _items(path)]
    return [Text(document) for document in read_documents(path)]


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    found = False
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        found = True
        try:
            yield json.loads(line), f"{path}, line {number}"
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: is no JSON: {error}") from error
    if not found:
        raise UsageError(f"{path}: holds no record")


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path}: must be a list of records that is not empty; one record a line is .jsonl")
    for number, record in enumerate(cast(list[Any], content)):
        yield record, f"{path}, item {number}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text (byte {error.start})") from error


def _hub(name: str) -> Iterator[Sample]:
    if find_spec("datasets") is None:
        raise UsageError(
            f"{name}: there is no such file; to train on a dataset of the hub, install the package 'datasets'"
        )
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    try:
        records = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: there is no such file, and no dataset of that name can be had: {str(error).splitlines()[0]}"
        ) from error
    for number, record in enumerate(records):
        yield _sample(record, f"{name}, row {number}")


def _sample(record: Any, where: str) -> Sample:
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: is no record with keys but {type(record).__name__}")
    fields = cast(Mapping[str, Any], record)
    if messages := fields.get("messages") or fields.get("conversations"):
        return _chat(messages, where)
    if "instruction" in fields:
        return _instruction(fields, where)
    if "text" in fields:
        return Text(_string(fields, "text", where))
    raise UsageError(
        f"{where}: has none of the keys text, instruction and output, messages; it has: {', '.join(map(str, fields))}"
    )


def _instruction(fields: Mapping[str, Any], where: str) -> Instruction:
    instruction, answer = _string(fields, "instruction", where), _string(fields, "output", where)
    given = fields.get("input") or ""
    if not isinstance(given, str):
        raise UsageError(f"{where}: input must be text")
    template = ALPACA_WITH_INPUT if given else ALPACA
    return Instruction(template.format(instruction=instruction, input=given), answer)


def _chat(messages: Any, where: str) -> Chat:
    if not isinstance(messages, list):
        raise UsageError(f"{where}: messages must be a list")
    found: list[dict[str, str]] = []
    for number, message in enumerate(cast(list[Any], messages)):
        if not isinstance(message, Mapping):
            raise UsageError(f"{where}: message {number} is no record with role and content")
        fields = cast(Mapping[str, Any], message)
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise UsageError(f"{where}: message {number} needs a role ({', '.join(ROLES)}) and content")
        found.append({"role": ROLES[role], "content": content})
    if not any(message["role"] == "assistant" for message in found):
        raise UsageError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return Chat(tuple(found))


def _string(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {key} must be text that is not empty")
    return value
