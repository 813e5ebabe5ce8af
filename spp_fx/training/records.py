"""Documents, instructions and chats, read from text files, JSON files and datasets of the hub."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

from spp_fx.errors import UsageError, unreadable

SEPARATOR = "<|endoftext|>"
"""A line that holds only this ends a document; without any, the file is one document."""

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

CHATS = ("messages", "conversations", "conversation")
"""Keys of a list of messages, the first of them that holds one counts; so for the keys below."""
PROMPTS = ("instruction", "prompt", "question", "query", "input")
INPUTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
SYSTEMS = ("system", "system_prompt")
ROLES = {
    alias: role
    for role, aliases in (
        ("system", "system developer"),
        ("user", "user human prompter"),
        ("assistant", "assistant gpt chatgpt bot bing bard model ai function_call function-call tool_call"),
        (
            "tool",
            "tool tool_response tool_result function function_response function-response observation ipython",
        ),
    )
    for alias in aliases.split()
}
"""Roles: names in public datasets (in lower case) -> names in chat templates."""

_DIGITS = re.compile(r"\.\d+")


@dataclass(frozen=True)
class Text:
    """A document; all of it is learned. `where` names its file and line, or its dataset and row."""

    text: str
    where: str


@dataclass(frozen=True)
class Instruction:
    """A prompt in Alpaca's template, and its answer."""

    prompt: str
    answer: str
    where: str


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`, for the tokenizer's own template."""

    messages: tuple[dict[str, str], ...]
    where: str


Sample = Text | Instruction | Chat
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Skip:
    """A row with nothing to learn in it, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Skipped:
    """How many rows were skipped, of how many, and the first of them."""

    count: int
    rows: int
    first: Skip | None

    def then(self, later: "Skipped") -> "Skipped":
        """With the rows that a later step skipped of those that were left."""
        return Skipped(self.count + later.count, self.rows, self.first or later.first)

    def line(self, data: str | Path) -> str | None:
        """One line for the user; None where no row was skipped."""
        if self.first is None:
            return None
        return (
            f"{data}: skipped {self.count} of {self.rows} rows, which have nothing to learn "
            f"(first: {self.first.where}: {self.first.reason}); --strict-data makes them errors"
        )


@dataclass(frozen=True)
class Records:
    """What a file or dataset holds.

    Attributes:
        data: the file, or the name of the dataset.
        samples: at least one.
        skipped: rows with nothing to learn in them.
    """

    data: str
    samples: list[Sample]
    skipped: Skipped


def read_samples(data: str | Path, *, strict: bool = False) -> Records:
    """The samples of a file (.json, .jsonl, anything else is text), or of a dataset of the hub.

    Read are the keys `text`; a prompt (`PROMPTS`) with an answer (`ANSWERS`), and an input or context; and lists of
    messages (`CHATS`) with role and content, or from and value. null is empty. A row that has nothing to learn
    (an empty text or answer, a chat in which no assistant speaks or that is more than text) is skipped.

    Args:
        strict: such a row is an error.

    Raises:
        UsageError: nothing is there, no row can be used, or a row is malformed (not JSON, not an object, none of
            the keys, a value that is not text); names the file and the line (.jsonl) or the item (.json).
    """
    samples, skipped = keep((_sample(record, where) for record, where in _records(data)), strict=strict)
    return Records(str(data), needed(data, samples, skipped), skipped)


def _records(data: str | Path) -> Iterator[tuple[Any, str]]:
    path, name = Path(data), str(data)
    hub = not path.exists() and name.count("/") <= 1 and (not path.suffix or _DIGITS.fullmatch(path.suffix))
    if hub:
        yield from _hub(name)
    elif path.suffix.lower() == ".jsonl":
        yield from _lines(path)
    elif path.suffix.lower() == ".json":
        yield from _items(path)
    else:
        for number, document in enumerate(_documents(path), start=1):
            yield {"text": document}, f"{path}, document {number}"


MEDIA = ("image", "audio", "path", "file")
"""Keys of the path of a picture or a recording, relative to the folder of the file that names it."""


def read_records(data: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The records of a file or dataset as they are, each with where it stands; of a folder, its pictures.

    Of a text file each line is one. A folder holds a folder for each class, with the files of the class in it. Paths of
    pictures and recordings become absolute.

    Raises:
        UsageError: nothing is there, or a record is no object.
    """
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.glob("*/*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise UsageError(f"{path}: has no file in a folder of a class")
        yield from (({"image": str(file), "label": file.parent.name}, str(file)) for file in files)
        return
    if path.is_file() and path.suffix.lower() not in (".json", ".jsonl"):
        lines = enumerate(_read(path, "utf-8").split("\n"), start=1)
        yield from (({"text": line}, f"{path}, line {number}") for number, line in lines if line.strip())
        return
    for record, where in _records(data):
        if not isinstance(record, Mapping):
            raise UsageError(f"{where}: is not a record with keys but {type(record).__name__}")
        fields = dict(cast(Mapping[str, Any], record))
        for key in MEDIA:
            if isinstance(fields.get(key), str) and path.is_file():
                fields[key] = str(path.parent / fields[key])
        yield fields, where


def keep(rows: Iterable[Kept | Skip], *, strict: bool) -> tuple[list[Kept], Skipped]:
    """The rows that are not skipped, and how many are.

    Raises:
        UsageError: a row is skipped, and `strict` forbids it.
    """
    kept: list[Kept] = []
    first, count = None, 0
    for row in rows:
        if not isinstance(row, Skip):
            kept.append(row)
            continue
        if strict:
            raise UsageError(f"{row.where}: {row.reason}; without --strict-data such rows are skipped")
        first, count = first or row, count + 1
    return kept, Skipped(count, len(kept) + count, first)


def needed(data: str | Path, kept: list[Kept], skipped: Skipped) -> list[Kept]:
    """The rows that were kept; UsageError if there are none."""
    if kept:
        return kept
    if skipped.first is None:
        raise UsageError(f"{data}: holds no record")
    raise UsageError(
        f"{skipped.first.where}: {skipped.first.reason}; none of the {skipped.rows} rows of {data} can be learned from"
    )


def _documents(path: Path) -> list[str]:
    parts = f"\n{_read(path, 'utf-8')}\n".split(f"\n{SEPARATOR}\n")
    documents = [document for part in parts if (document := part.strip())]
    if not documents:
        raise UsageError(f"{path}: holds no text")
    return documents


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{path}, line {number}"
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: is not JSON: {error}") from error


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON: {error}; one record a line is .jsonl") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path}: must be a list of records that is not empty; one record a line is .jsonl")
    for number, record in enumerate(cast(list[Any], content)):
        yield record, f"{path}, item {number}"


def _read(path: Path, encoding: str = "utf-8-sig") -> str:
    try:
        return path.read_text(encoding=encoding)
    except OSError as error:
        raise UsageError(f"{path}: {unreadable(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _hub(name: str) -> Iterator[tuple[Any, str]]:
    if find_spec("datasets") is None:
        raise UsageError(
            f"{name}: there is no such file; to read a dataset from the hub, install the package 'datasets'"
        )
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    try:
        records = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{name}: there is no such file, and no dataset of that name can be loaded: {said}"
        ) from error
    for number, record in enumerate(records):
        yield record, f"{name}, row {number}"


def _sample(record: Any, where: str) -> Sample | Skip:
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: is not a record with keys but {type(record).__name__}")
    fields = cast(Mapping[str, Any], record)
    chats = [key for key in CHATS if key in fields]
    for key in chats:
        if fields[key]:
            return _chat(fields, key, fields[key], where)
    prompts = [key for key in PROMPTS if key in fields]
    answers = [key for key in ANSWERS if key in fields]
    if prompts and answers:
        prompt, answer = (
            next((fields[key] for key in keys if fields[key]), "") for keys in (prompts, answers)
        )
        if isinstance(prompt, list) and isinstance(answer, list):
            return _chat(fields, prompts[0], [*cast(list[Any], prompt), *cast(list[Any], answer)], where)
        return _instruction(fields, prompts, answers, where)
    if "text" in fields:
        text = _string(fields, "text", where)
        return Text(text, where) if text.strip() else Skip(where, "text is empty")
    if chats:
        return Skip(where, f"{chats[0]} is empty")
    if prompts:
        raise UsageError(f"{where}: has {prompts[0]} and no answer to it ({', '.join(ANSWERS)})")
    found = ", ".join(map(str, fields)) or "none"
    raise UsageError(
        f"{where}: has none of the keys text, messages, or instruction and output (prompt and completion, question "
        f"and answer); it has: {found}"
    )


def _instruction(
    fields: Mapping[str, Any], prompts: list[str], answers: list[str], where: str
) -> Instruction | Skip:
    texts = {
        key: _string(fields, key, where) for key in {*prompts, *answers, *INPUTS, *SYSTEMS} if key in fields
    }
    filled = {key: text for key, text in texts.items() if text.strip()}
    asked = next((key for key in prompts if key in filled), None)
    answered = next((key for key in answers if key in filled), None)
    if answered is None:
        return Skip(where, f"{answers[0]} is empty")
    if asked is None:
        return Skip(where, f"{prompts[0]} is empty")
    given = next((filled[key] for key in INPUTS if key in filled and key != asked), "")
    system = next((f"{filled[key]}\n\n" for key in SYSTEMS if key in filled), "")
    template = ALPACA_WITH_INPUT if given else ALPACA
    prompt = template.format(instruction=system + filled[asked], input=given)
    return Instruction(prompt, filled[answered], where)


def _chat(fields: Mapping[str, Any], key: str, messages: Any, where: str) -> Chat | Skip:
    if not isinstance(messages, list):
        raise UsageError(f"{where}: {key} must be a list of messages")
    found: list[dict[str, str]] = []
    for number, message in enumerate(cast(list[Any], messages)):
        said = _message(message, where, f"message {number}")
        if isinstance(said, Skip):
            return said
        if said["role"] != "system" or said["content"].strip():
            found.append(said)
    spoken = [message["content"] for message in found if message["role"] == "assistant"]
    if not spoken:
        return Skip(where, "no message is the assistant's, so there is nothing to learn")
    if not any(content.strip() for content in spoken):
        return Skip(where, "every message of the assistant is empty")
    system = next((text for name in SYSTEMS if (text := _string(fields, name, where)).strip()), "")
    if system and all(message["role"] != "system" for message in found):
        found.insert(0, {"role": "system", "content": system})
    return Chat(tuple(found), where)


def _message(message: Any, where: str, which: str) -> dict[str, str] | Skip:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: {which} is not a record with role and content")
    fields = cast(Mapping[str, Any], message)
    role = fields.get("role") or fields.get("from")
    content = next((fields[key] for key in ("content", "value") if fields.get(key) is not None), "")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UsageError(f"{where}: {which} needs a role ({', '.join(ROLES)}), it has {role!r}")
    if fields.get("tool_calls") or fields.get("function_call"):
        return Skip(where, f"{which} calls tools outside its content, which is not read")
    if isinstance(content, list):
        parts = [_part(part, where, which) for part in cast(list[Any], content)]
        if skip := next((part for part in parts if isinstance(part, Skip)), None):
            return skip
        content = "".join(cast(list[str], parts))
    if not isinstance(content, str):
        raise UsageError(f"{where}: {which} needs content that is text or a list of parts")
    return {"role": ROLES[role.lower()], "content": content}


def _part(part: Any, where: str, which: str) -> str | Skip:
    """The text of one part of a message: {"type": "text", "text": ...}, or the text itself."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise UsageError(f"{where}: {which} has a part that is not a record with type and text")
    fields = cast(Mapping[str, Any], part)
    kind = fields.get("type", "text")
    if kind != "text":
        return Skip(where, f"{which} has a part of type {kind!r}, only text is learned from")
    return _string(fields, "text", where)


def _string(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A text, empty where it is null or missing."""
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} must be text, not {type(value).__name__}")
    return value
