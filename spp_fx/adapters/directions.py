"""Directions in which the first steps of training gain most: singular vectors of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS, AT_LEAST, ITERATIONS = 4, 16, 4
"""Of the randomised decomposition: columns for each vector that is asked for, in all at least, and passes.

LoRS takes 4 columns a vector and 4 passes.
"""


def right_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first right singular vectors, or those of each matrix of a batch.

    The same matrix gives the same vectors: the random start is fixed, and each vector's largest entry is positive.

    Args:
        matrix: (..., m, n), of any floating dtype.
        count: r; vectors beyond min(m, n), or of a singular value of about 0, are zero.

    Returns:
        (..., r, n) float32, rows of norm 1 or 0.
    """
    *batch, m, n = matrix.shape
    work = matrix.float()
    size = work.abs().amax((-2, -1), keepdim=True)
    work = work / torch.where(size > 0, size, 1)  # a gradient's squares would underflow
    result = work.new_zeros(*batch, count, n)
    most = min(count, m, n)
    devices = [work.device] if work.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        _, values, vectors = torch.svd_lowrank(
            work, q=min(max(COLUMNS * count, AT_LEAST), m, n), niter=ITERATIONS
        )
    kept = values[..., :most, None] > 1e-6 * values[..., :1, None]
    rows = vectors[..., :most].transpose(-1, -2)
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    result[..., :most, :] = torch.where(kept, rows * largest.sign(), 0)
    return result


def at_norm_of(start: Tensor, directions: Tensor) -> Tensor:
    """Directions as a start of the same size: all rows have the root mean square that the whole of `start` has.

    A row that is zero, since there is no such direction, stays as it is in `start`.

    Args:
        start: (r, n), the default start of a factor.
        directions: (r, n), rows of any norm.
    """
    rms = start.double().square().mean().sqrt()
    size = directions.double().square().mean(-1, keepdim=True).sqrt()
    scaled = directions * (rms / torch.where(size > 0, size, 1))
    return torch.where(size > 0, scaled, start).to(start.dtype)
