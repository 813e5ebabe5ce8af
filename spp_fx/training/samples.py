"""Samples as tokens with the labels that are learned, one to a row or packed into windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.training.records import Chat, Instruction, Sample, Text

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of one sample, of the same length."""

    ids: list[int]
    labels: list[int]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, *, answer_only: bool, length: int, where: str
) -> Tokens:
    """One sample as at most `length` tokens; the end is cut off.

    Args:
        answer_only: learn the answer (of a chat: what the assistant says) and not the prompt.

    Raises:
        UsageError: the tokenizer has no chat template, or one that does not grow with the messages.
    """
    if isinstance(sample, Text):
        ids = _ended(tokenizer, _encode(tokenizer, sample.text))
        return Tokens(ids[:length], ids[:length])
    if isinstance(sample, Instruction):
        prompt = _encode(tokenizer, sample.prompt)
        ids = prompt + _ended(tokenizer, _encode(tokenizer, sample.answer, special=False))
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :] if answer_only else list(ids)
        return Tokens(ids[:length], labels[:length])
    ids, learned = _chat(tokenizer, sample, where)
    labels = [
        i if is_learned or not answer_only else IGNORED for i, is_learned in zip(ids, learned, strict=True)
    ]
    return Tokens(ids[:length], labels[:length])


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which of them the assistant says: found by growing the chat message by message."""
    if not tokenizer.chat_template:
        raise UsageError(f"{where}: is a chat, and the model's tokenizer has no chat template")
    ids: list[int] = []
    learned: list[bool] = []
    for count in range(1, len(chat.messages) + 1):
        role = chat.messages[count - 1]["role"]
        after = _template(tokenizer, chat.messages[:count])
        if after[: len(ids)] != ids:
            raise UsageError(
                f"{where}: the tokenizer's chat template rewrites earlier messages, so what the assistant says "
                "cannot be told apart; train with --loss-on all"
            )
        learned += [role == "assistant"] * (len(after) - len(ids))
        ids = after
    return ids, learned


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    found: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])  # type: ignore[arg-type]


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return [*ids, end] if isinstance(end, int) and (not ids or ids[-1] != end) else ids


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
        ids = torch.tensor(row.ids, dtype=torch.int64)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor(row.labels, dtype=torch.int64),
        }


def pack(samples: Sequence[Tokens], length: int) -> list[Tokens]:
    """Rows of at most `length` tokens, filled first-fit with the longest samples first."""
    rows: list[Tokens] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda each: len(each.ids), reverse=True):
        size = len(sample.ids)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        # The first token of a sample is not predicted from the sample before it.
        labels = [IGNORED, *sample.labels[1:]]
        if place is None:
            rows.append(Tokens(list(sample.ids), labels))
            room.append(length - size)
        else:
            rows[place].ids.extend(sample.ids)
            rows[place].labels.extend(labels)
            room[place] -= size
    return rows


def pad(rows: Sequence[dict[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """Rows of several lengths as one batch: padded on the right, padding neither seen nor learned."""
    longest = max(row["input_ids"].numel() for row in rows)
    fill = {"input_ids": pad_token, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.stack(
            [torch.nn.functional.pad(row[key], (0, longest - row[key].numel()), value=value) for row in rows]
        )
        for key, value in fill.items()
    }
