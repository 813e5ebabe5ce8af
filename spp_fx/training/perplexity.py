"""Perplexity of a text under a causal language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Perplexity:
    """Mean loss over the predicted tokens of a text.

    Attributes:
        loss: natural logarithm, per predicted token.
        tokens: how many were predicted: all but the first of each window, or with overlapping windows of the text.
        windows: how many windows there were.
    """

    loss: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return exp(self.loss) if self.loss < 700 else float("inf")


@torch.no_grad()
def perplexity(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    windows: Sequence[Tensor],
    tick: Callable[[int], None] = lambda n: None,
    *,
    overlap: int = 0,
) -> Perplexity:
    """Each window predicts its own tokens from the second on; the mean is over all of them.

    Args:
        logits_of: (input_ids, attention_mask), both (b, length) int64, to logits (b, length, vocabulary).
        windows: (length,) int64 each.
        tick: called with the number of windows done.
        overlap: tokens at the start of each window but the first that the window before has predicted; they are
            read and not predicted again.
    """
    total, count = 0.0, 0
    for first, group in ((True, windows[:1]), (False, windows[1:])) if overlap else ((True, windows),):
        known = 1 if first else max(1, overlap)
        for batch in _batches(group):
            ids = torch.stack(batch)
            logits = logits_of(ids, torch.ones_like(ids))[:, known - 1 : -1].float()
            targets = ids[:, known:].flatten().to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            total += float(loss.double().sum())
            count += loss.numel()
            tick(len(batch))
    return Perplexity(total / count, count, len(windows))


def _batches(windows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Windows of one length together, at most BATCH_TOKENS tokens at once."""
    result: list[list[Tensor]] = []
    for window in windows:
        last = result[-1] if result else []
        if last and last[0].numel() == window.numel() and (len(last) + 1) * window.numel() <= BATCH_TOKENS:
            last.append(window)
        else:
            result.append([window])
    return result
