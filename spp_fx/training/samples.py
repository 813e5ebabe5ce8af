"""Samples as tokens, and the rows that are trained on or measured."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.training.records import (
    Chat,
    Instruction,
    Records,
    Sample,
    Skip,
    Skipped,
    Text,
    keep,
    needed,
    read_samples,
)

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of one sample, of the same length."""

    ids: list[int]
    labels: list[int]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    *,
    answer_only: bool = False,
    length: int | None = None,
    strict: bool = False,
) -> tuple[list[Tokens], Skipped]:
    """Samples as the text that the model sees: text as it is, instructions in Alpaca's template, chats in their own.

    Args:
        answer_only: learn the answer (of a chat: what the assistant says) and not the prompt.
        length: tokens of a sample at most; the end is cut off.
        strict: a sample with nothing left to learn is an error.

    Returns:
        Tokens of each sample, at least one, and how many rows were skipped, by the reader or here: where nothing
        is learned within `length`, or the chat template rejects the messages.

    Raises:
        UsageError: no sample is left, there are chats and the tokenizer has no template for them, or one that does
            not grow with the messages where only answers are learned.
    """
    rows = _tokenized(tokenizer, records.samples, answer_only, length)
    kept, skipped = keep(rows, strict=strict)
    skipped = records.skipped.then(skipped)
    return needed(records.data, kept, skipped), skipped


def token_stream(
    tokenizer: PreTrainedTokenizerBase, records: Records, *, strict: bool = False
) -> tuple[Tensor, Skipped]:
    """All samples one after the other, each with the tokenizer's own start and an end: (tokens,) int64.

    Returns, Raises:
        As `tokenize`.
    """
    samples, skipped = tokenize(tokenizer, records, strict=strict)
    return torch.tensor([token for sample in samples for token in sample.ids], dtype=torch.int64), skipped


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], answer_only: bool, length: int | None
) -> Iterator[Tokens | Skip]:
    texts = iter(_encode_all(tokenizer, [sample.text for sample in samples if isinstance(sample, Text)]))
    for sample in samples:
        if isinstance(sample, Text):
            ids = _ended(tokenizer, next(texts))
            labels = ids
        elif isinstance(sample, Instruction):
            prompt = _encode(tokenizer, sample.prompt)
            ids = prompt + _ended(tokenizer, _encode(tokenizer, sample.answer, special=False))
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :] if answer_only else ids
        else:
            found = _chat(tokenizer, sample, answer_only)
            if isinstance(found, Skip):
                yield found
                continue
            ids, labels = found
        if length is not None and all(label == IGNORED for label in labels[1:length]):
            what = (
                f"no answer begins within {length} tokens; raise --seq-len" if answer_only else "is one token"
            )
            yield Skip(sample.where, what)
        else:
            yield Tokens(list(ids[:length]), list(labels[:length]))


def _chat(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, answer_only: bool
) -> tuple[list[int], list[int]] | Skip:
    """Ids and labels of a chat. What the assistant says is found by growing the chat message by message."""
    if not tokenizer.chat_template:
        raise UsageError(f"{chat.where}: is a chat, but the model's tokenizer has no chat template")
    try:
        ids = _template(tokenizer, chat.messages)
        if not answer_only:
            return ids, ids
        labels: list[int] = []
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            before = _template(tokenizer, chat.messages[:number]) if number else []
            after = _template(tokenizer, chat.messages[: number + 1])
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise UsageError(
                    f"{chat.where}: the tokenizer's chat template rewrites earlier messages, so the assistant's "
                    "tokens cannot be identified; train with --loss-on all"
                )
            labels += [IGNORED] * (len(before) - len(labels)) + after[len(before) :]
        return ids, labels + [IGNORED] * (len(ids) - len(labels))
    except (TemplateError, TypeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        return Skip(chat.where, f"the tokenizer's chat template rejects it: {said}")


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    found: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, verbose=False)["input_ids"]) if texts else []  # type: ignore[arg-type]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])  # type: ignore[arg-type]


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return [*ids, end] if isinstance(end, int) and (not ids or ids[-1] != end) else ids


GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, spread evenly however many there are."""


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Consecutive windows of a row of tokens, which begin elsewhere in every epoch.

    A text that is seen several times is memorized more slowly when its windows begin elsewhere each time. The
    cut is a function of the epoch, so a resumed run sees what an uninterrupted one would.

    Args:
        tokens: (tokens,) int64, at least one window.
        length: tokens per window.
        fixed: windows begin at the same tokens in every epoch, and none is left out to make room.
    """

    def __init__(self, tokens: Tensor, length: int, *, fixed: bool = False) -> None:
        self.tokens = tokens
        self.length = length
        self.fixed = fixed
        self.shift = 0

    def cut(self, epoch: int) -> None:
        """Choose where the windows of an epoch begin."""
        room = self.tokens.numel() - len(self) * self.length
        moves = room >= self.length and not self.fixed
        self.shift = int(epoch * GOLDEN * self.length) % self.length if moves else 0

    def __len__(self) -> int:
        whole = self.tokens.numel() // self.length
        return whole if self.fixed else max(1, whole - 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.shift + index * self.length
        ids = self.tokens[start : start + self.length]
        return _row(ids, ids)


def check_vocabulary(tokens: Tensor, vocabulary: int, where: str | Path) -> None:
    """UsageError unless every token is one of the model's."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise UsageError(
            f"{where}: the tokenizer produces token {largest}, but the model's vocabulary has {vocabulary} tokens; "
            "use the model's own tokenizer"
        )


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples, each a row of its own length, or several to a row of at most `length` tokens.

    Packing puts short samples one after the other, each row filled with the first that fit; a token may
    attend to the samples before its own in the row. No sample is cut for it.
    """

    def __init__(self, samples: Sequence[Tokens], *, length: int, packing: bool) -> None:
        self.rows = pack(samples, length) if packing else list(samples)

    @property
    def tokens(self) -> Tensor:
        """Every token, (tokens,) int64."""
        return torch.tensor([token for row in self.rows for token in row.ids], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return _row(torch.tensor(row.ids, dtype=torch.int64), torch.tensor(row.labels, dtype=torch.int64))


def _row(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pack(samples: Sequence[Tokens], length: int) -> list[Tokens]:
    """Rows of at most `length` tokens, filled first-fit with the longest samples first."""
    rows: list[Tokens] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda each: len(each.ids), reverse=True):
        size = len(sample.ids)
        fit = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if fit == len(rows):
            rows.append(Tokens([], []))
            room.append(length)
        rows[fit].ids.extend(sample.ids)
        # The first token of a sample is not predicted from the sample before it.
        rows[fit].labels.extend([IGNORED, *sample.labels[1:]])
        room[fit] -= size
    return rows


def pad(
    rows: Sequence[dict[str, Tensor]], pad_token: int, least: int = 0, fixed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Rows of several lengths as one batch: padded on the right, padding neither seen nor learned.

    Values of a token that have several numbers, such as `draws`, are padded with zeros in that dimension, too.

    Args:
        least: tokens that the batch has at least.
        fixed: names of what has one value, or several, for a row and not for each token.
    """
    fill = {"input_ids": pad_token, "decoder_input_ids": pad_token, "labels": IGNORED}

    def padded(key: str) -> Tensor:
        values = [row[key] for row in rows]
        if key in fixed:
            return torch.stack(values)
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        shape[0] = max(shape[0], least)
        batch = values[0].new_full((len(rows), *shape), fill.get(key, 0))
        for row, value in zip(batch, values, strict=True):
            row[tuple(slice(size) for size in value.shape)] = value
        return batch

    return {key: padded(key) for key in rows[0]}


Rows = Windows | Samples


@dataclass(frozen=True)
class HeldOut:
    """Text to measure: windows of tokens, (length,) int64 each, and the rows of the data left out of them.

    Attributes:
        overlap: tokens at the start of each window but the first that the one before has, too.
    """

    windows: list[Tensor]
    skipped: Skipped
    overlap: int = 0


def training_rows(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    loss_on: str,
    packing: bool,
    strict: bool = False,
    fixed: bool = False,
) -> tuple[Rows, Skipped]:
    """The rows of a data file or dataset: full windows of text, or one sample (packed: several) to a row.

    Args:
        fixed: windows of text begin at the same tokens in every epoch, see `Windows`.
        strict: rows with nothing to learn are an error; else they are left out and counted.

    Raises:
        UsageError: the data cannot be used, or nothing in it is learned.
    """
    records = read_samples(data, strict=strict)
    if all(isinstance(sample, Text) for sample in records.samples):
        if loss_on == "answer":
            raise UsageError(
                f"{data}: is plain text without answers; --loss-on answer needs instructions or chats"
            )
        tokens, skipped = token_stream(tokenizer, records, strict=strict)
        if tokens.numel() < length:
            raise UsageError(
                f"{data}: its {tokens.numel()} tokens do not fill a window of {length}; use more text or a smaller "
                "--seq-len"
            )
        return Windows(tokens, length, fixed=fixed), skipped
    answer_only = loss_on == "answer"
    samples, skipped = tokenize(tokenizer, records, answer_only=answer_only, length=length, strict=strict)
    return Samples(samples, length=length, packing=packing), skipped


def held_out(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    stride: int | None = None,
    strict: bool = False,
) -> HeldOut:
    """Every window of a file or dataset, the last of which may be shorter; none has fewer than two tokens.

    The samples stand one after the other, instructions and chats as the whole text that the model would see: a
    prompt is measured like its answer, as --loss-on all learns it.

    Args:
        stride: tokens from the start of one window to that of the next, at most `length`, the default.

    Raises:
        UsageError: the data cannot be used, or has fewer than two tokens.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(f"--stride must be 1 to {length}, the tokens of a window, got {stride}")
    tokens, skipped = token_stream(tokenizer, read_samples(data, strict=strict), strict=strict)
    if tokens.numel() < 2:
        raise UsageError(f"{data}: has fewer than two tokens, so nothing can be predicted")
    # The first window, and then one for each `stride` tokens that are left.
    count = 1 + max(0, -(-(tokens.numel() - length) // stride))
    windows = [tokens[start : start + length] for start in range(0, count * stride, stride)]
    return HeldOut([window for window in windows if window.numel() > 1], skipped, length - stride)


def evaluation_rows(windows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Evaluation windows in the form of training rows."""
    return [_row(ids, ids) for ids in windows]


def pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int, own: int | None = None) -> int:
    """A token of the model to fill rows with: its own, the tokenizer's, else its end of text, else 0; it is never seen.

    Args:
        own: the model's, by which some classifiers find the last token of a row.
    """
    for token in (own, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token < vocabulary:
            return token
    return 0
