"""The rows that are trained on: windows of text, or samples of instructions and chats."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.training.data import Windows, training_windows
from spp_fx.training.records import Text, read_samples
from spp_fx.training.samples import IGNORED, Samples, tokenize

Rows = Windows | Samples


def training_rows(
    data: Path, tokenizer: PreTrainedTokenizerBase, length: int, *, loss_on: str, packing: bool
) -> Rows:
    """The rows of a data file or dataset: full windows of text, or one sample (packed: several) to a row.

    Raises:
        UsageError: the data cannot be used, or nothing in it is learned.
    """
    samples = read_samples(data)
    if all(isinstance(sample, Text) for sample in samples):
        if loss_on == "answer":
            raise UsageError(
                f"{data}: is text, which has no answers; --loss-on answer needs instructions or chats"
            )
        return training_windows(
            data, [sample.text for sample in samples if isinstance(sample, Text)], tokenizer, length
        )
    answer_only = loss_on == "answer"
    tokens = [
        tokenize(tokenizer, sample, answer_only=answer_only, length=length, where=f"{data}, sample {number}")
        for number, sample in enumerate(samples, start=1)
    ]
    learned = [each for each in tokens if any(label != IGNORED for label in each.labels[1:])]
    if not learned:
        raise UsageError(f"{data}: no answer begins within {length} tokens; raise --seq-len")
    return Samples(learned, length=length, packing=packing)


def evaluation_rows(windows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Evaluation windows in the form of training rows."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in windows]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with: the tokenizer's own, else its end of text, else 0; it is never seen."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
