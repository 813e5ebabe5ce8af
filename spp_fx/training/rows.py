"""The rows that are trained on and the windows that are measured: of text, or of instructions and chats."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.training.data import Windows
from spp_fx.training.records import Skipped, Text, read_samples
from spp_fx.training.samples import Samples, token_stream, tokenize

Rows = Windows | Samples


@dataclass(frozen=True)
class HeldOut:
    """Text to measure: windows of tokens, (length,) int64 each, and the rows of the data left out of them."""

    windows: list[Tensor]
    skipped: Skipped


def training_rows(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    loss_on: str,
    packing: bool,
    strict: bool = False,
) -> tuple[Rows, Skipped]:
    """The rows of a data file or dataset: full windows of text, or one sample (packed: several) to a row.

    Args:
        strict: rows with nothing to learn are an error; else they are left out and counted.

    Raises:
        UsageError: the data cannot be used, or nothing in it is learned.
    """
    records = read_samples(data, strict=strict)
    if all(isinstance(sample, Text) for sample in records.samples):
        if loss_on == "answer":
            raise UsageError(
                f"{data}: is text, which has no answers; --loss-on answer needs instructions or chats"
            )
        tokens, skipped = token_stream(tokenizer, records, strict=strict)
        if tokens.numel() < length:
            raise UsageError(
                f"{data}: its {tokens.numel()} tokens fill no window of {length}; use more text or a smaller "
                "--seq-len"
            )
        return Windows(tokens, length), skipped
    answer_only = loss_on == "answer"
    samples, skipped = tokenize(tokenizer, records, answer_only=answer_only, length=length, strict=strict)
    return Samples(samples, length=length, packing=packing), skipped


def held_out(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, *, strict: bool = False
) -> HeldOut:
    """Every window of a file or dataset, the last of which may be shorter; none has fewer than two tokens.

    The samples stand one after the other, instructions and chats as the whole text that the model would see: a
    prompt is measured like its answer, as --loss-on all learns it.

    Raises:
        UsageError: the data cannot be used, or has fewer than two tokens.
    """
    tokens, skipped = token_stream(tokenizer, read_samples(data, strict=strict), strict=strict)
    if tokens.numel() < 2:
        raise UsageError(f"{data}: has fewer than two tokens, nothing can be predicted")
    return HeldOut([window for window in tokens.split(length) if window.numel() > 1], skipped)


def evaluation_rows(windows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Evaluation windows in the form of training rows."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in windows]


def pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """A token of the model to fill rows with: the tokenizer's own, else its end of text, else 0; it is never seen."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token < vocabulary:
            return token
    return 0
