"""Documents of text files, and windows of a row of tokens to train on."""

from pathlib import Path

import torch
from torch import Tensor

from spp_fx.errors import UsageError

SEPARATOR = "<|endoftext|>"
"""A line that holds only this ends a document; without any, the file is one document."""

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, spread evenly however many there are."""


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 text file.

    Raises:
        UsageError: the file is missing, is not text, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    documents = [part.strip() for part in f"\n{text}\n".split(f"\n{SEPARATOR}\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise UsageError(f"{path}: holds no text")
    return documents


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Consecutive windows of a row of tokens, cut at another place in every epoch.

    A text that is seen several times is learned by heart more slowly when its windows begin elsewhere each
    time. The cut is a function of the epoch, so a resumed run sees what an uninterrupted one would.

    Args:
        tokens: (tokens,) int64, at least one window.
        length: tokens per window.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens = tokens
        self.length = length
        self.shift = 0

    def cut(self, epoch: int) -> None:
        """Choose where the windows of an epoch begin."""
        room = self.tokens.numel() - len(self) * self.length
        self.shift = int(epoch * GOLDEN * self.length) % self.length if room >= self.length else 0

    def __len__(self) -> int:
        whole = self.tokens.numel() // self.length
        return max(1, whole - 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.shift + index * self.length
        ids = self.tokens[start : start + self.length]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def check_vocabulary(tokens: Tensor, vocabulary: int, where: str | Path) -> None:
    """UsageError unless every token is one of the model's."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise UsageError(
            f"{where}: the tokenizer makes token {largest}, the model knows {vocabulary}: they do not belong together"
        )
