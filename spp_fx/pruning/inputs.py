"""What calibration learns of the inputs of one weight."""

from __future__ import annotations

import torch
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.pruning.select import row_blocks

BLOCK_ELEMENTS = 1 << 22
KEPT_TOKENS = 512
"""Inputs of so many tokens, spread over the samples, are kept to measure what pruning does to outputs."""


class Inputs:
    """Sums over the calibration tokens' inputs x (features,) of one matrix.

    Attributes:
        features: n.
        samples, tokens: how many were added.
        hessian: 2/samples times the sum of x x^T, (n, n) float32, where it was asked for.
    """

    def __init__(
        self, features: int, *, hessian: bool = False, samples: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.features = features
        self.samples = 0
        self.tokens = 0
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.hessian = torch.zeros(features, features, device=device) if hessian else None
        self._kept: list[Tensor] = []
        self._keep = max(1, KEPT_TOKENS // samples)

    def add(self, x: Tensor) -> None:
        """Add the tokens of one sample.

        Args:
            x: (tokens, features) of any floating dtype.

        Raises:
            PatternError: an input is NaN or infinite.
        """
        count = self.samples + 1
        past = self.samples / count
        for part in x.split(max(1, BLOCK_ELEMENTS // max(1, self.features))):
            part = part.float()
            self._sum += part.sum(0)
            self._squares += part.square().sum(0)
            if self.hessian is not None:
                self.hessian.addmm_(part.t(), part, beta=past, alpha=2 / count)
                past = 1.0
        if not bool(self._squares.isfinite().all()):
            raise PatternError(f"its inputs are NaN or infinite in calibration sample {self.samples + 1}")
        self.samples += 1
        self.tokens += len(x)
        places = torch.linspace(0, len(x) - 1, min(self._keep, len(x)), device=x.device).long()
        self._kept.append(x[places])

    @property
    def norms(self) -> Tensor:
        """(n,) float32: the root of the mean over samples of the sum of squares."""
        return (self._squares / max(1, self.samples)).sqrt().float()

    @property
    def mean(self) -> Tensor:
        """(n,) float32: over tokens."""
        return (self._sum / max(1, self.tokens)).float()

    @property
    def variance(self) -> Tensor:
        """(n,) float32: over tokens, of the whole population."""
        count = max(1, self.tokens)
        return (self._squares / count - (self._sum / count).square()).clamp_min(0).float()

    @property
    def dead(self) -> int:
        """How many inputs were 0 in every token."""
        return int((self._squares == 0).sum())

    @property
    def kept(self) -> Tensor:
        """(tokens, n): some of the inputs themselves, spread over the samples."""
        if not self._kept:
            return torch.empty(0, self.features)
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def reorder(self, order: Tensor) -> None:
        """Take the inputs in another order: the new i-th is the old order[i]-th."""
        self._sum, self._squares = self._sum[order], self._squares[order]
        self._kept = [self.kept[:, order]]
        if self.hessian is not None:
            self.hessian = self.hessian[order][:, order]


def output_energy(
    x: Tensor, weight: Tensor, *, minus: Tensor | None = None, without: Tensor | None = None
) -> float:
    """The squared norm of X D^T in blocks of rows of D.

    Args:
        x: (tokens, n).
        weight: D (m, n), unless one of the following is given.
        minus: another weight V: D = W - V.
        without: a mask: D is W outside of it.
    """
    total, x = 0.0, x.float()
    for part, other, mask in row_blocks(
        weight, weight if minus is None else minus, weight if without is None else without
    ):
        block = part.float() if minus is None else part.float() - other.float()
        if without is not None:
            block = block.masked_fill(mask, 0)
        total += float((x @ block.t()).double().square().sum())
    return total
