"""Text as training and evaluation windows."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError

SEPARATOR = "<|endoftext|>"
"""A line that holds only this ends a document; without any, the file is one document."""

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, spread evenly however many there are."""


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 text file.

    Raises:
        UsageError: the file is missing, is no text, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text (byte {error.start})") from error
    documents = [part.strip() for part in f"\n{text}\n".split(f"\n{SEPARATOR}\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise UsageError(f"{path}: holds no text")
    return documents


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """All documents as one row of tokens, each with the tokenizer's own start and an end: (tokens,) int64."""
    tokens: list[int] = []
    for ids in tokenizer(documents, verbose=False)["input_ids"]:  # type: ignore[union-attr]
        tokens += list(ids)  # type: ignore[arg-type]
        end = tokenizer.eos_token_id
        if isinstance(end, int) and tokens[-1] != end:
            tokens.append(end)
    return torch.tensor(tokens, dtype=torch.int64)


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


def training_windows(
    path: Path, documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Windows:
    """The windows of documents to train on; `path` is where they came from.

    Raises:
        UsageError: the text fills no window.
    """
    tokens = encode(tokenizer, documents)
    if tokens.numel() < length:
        raise UsageError(
            f"{path}: its {tokens.numel()} tokens fill no window of {length}; use more text or a smaller --seq-len"
        )
    return Windows(tokens, length)


def all_windows(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    """Every window of a text, the last of which may be shorter; none has fewer than two tokens."""
    tokens = encode(tokenizer, read_documents(path))
    if tokens.numel() < 2:
        raise UsageError(f"{path}: has fewer than two tokens, nothing can be predicted")
    return [window for window in tokens.split(length) if window.numel() > 1]


def check_vocabulary(tokens: Tensor, vocabulary: int, where: Path) -> None:
    """UsageError unless every token is one of the model's."""
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise UsageError(
            f"{where}: the tokenizer makes token {largest}, the model knows {vocabulary}: they do not belong together"
        )
