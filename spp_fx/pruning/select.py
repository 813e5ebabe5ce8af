"""Which entries of a matrix are kept: those of the largest scores."""

from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.sparsity.pattern import NM, Pattern

BLOCK_ELEMENTS = 1 << 20
"""Elements per block of rows: temporaries are bounded by this, not by the weight."""


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several matrices, block after block, as views."""
    rows, columns = matrices[0].shape
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield tuple(matrix[start : start + step] for matrix in matrices)


def keep_of_groups(score: Tensor, pattern: NM) -> Tensor:
    """N largest of every M consecutive entries of a row; among equals the earlier.

    Args:
        score: (out, in), any real dtype.

    Returns:
        (out, in) bool, true where the entry is kept.

    Raises:
        PatternError: in is not a multiple of M.
    """
    out, columns = score.shape
    if columns % pattern.group:
        raise PatternError(
            f"its {columns} inputs are not a multiple of {pattern.group}, so {pattern} cannot hold"
        )
    kept = torch.zeros(out, columns, dtype=torch.bool, device=score.device)
    for part, target in row_blocks(score, kept):
        groups = part.reshape(-1, pattern.group)
        # A stable sort puts the earlier of two equals first, so the result does not depend on the kernel.
        order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.kept]
        target.view(-1, pattern.group).scatter_(1, order, True)
    return kept


def keep_of_matrix(score: Tensor, share: Fraction) -> Tensor:
    """All but the int(share * size) smallest of the whole matrix; among equals the earlier are kept."""
    return keep_all_but(score, int(share * score.numel()))


def keep_all_but(score: Tensor, count: int) -> Tensor:
    """All but the `count` smallest of the whole matrix; among equals the earlier are kept."""
    flat = _comparable(score).flatten()
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    dropped = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    dropped[ties[len(ties) - (count - int(dropped.sum())) :]] = True
    return ~dropped.view(score.shape)


def keep_of_rows(score: Tensor, share: Fraction) -> Tensor:
    """All but the int(share * in) smallest of every row; among equals the earlier are kept."""
    columns = score.shape[1]
    count = int(share * columns)
    kept = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    for part, target in row_blocks(score, kept) if count else ():
        # Stable: of equals the earlier come first, so the last are dropped.
        order = _comparable(part).argsort(dim=1, descending=True, stable=True)
        target.scatter_(1, order[:, columns - count :], False)
    return kept


def keep(score: Tensor, pattern: Pattern, *, by_row: bool) -> Tensor:
    """The entries that a pattern keeps: groups for N:M, else a share of each row or of the whole matrix."""
    if isinstance(pattern, NM):
        return keep_of_groups(score, pattern)
    return keep_of_rows(score, pattern.share) if by_row else keep_of_matrix(score, pattern.share)


def _comparable(score: Tensor) -> Tensor:
    """In float32 at least: kthvalue lacks halves."""
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
