"""sparsegpt: prune column by column, and let the columns that follow make up for what was lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.errors import PatternError, UsageError
from spp_fx.options import at_least_one, not_negative, option
from spp_fx.pruning.criterion import Criterion, register
from spp_fx.pruning.select import keep_all_but, keep_of_groups
from spp_fx.pruning.statistics import Inputs
from spp_fx.sparsity.pattern import NM, Pattern

BLOCK_SIZE = 128
DAMP = 0.01


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGpt(Criterion):
    """Frantar and Alistarh, 2023. Unstructured patterns are chosen block by block of `block_size` columns."""

    hessian = True
    damp: float = option(DAMP, "added to the Hessian's diagonal, as a share of its mean", not_negative)
    block_size: int = option(BLOCK_SIZE, "columns between updates of all columns that follow", at_least_one)

    def check(self, columns: int, pattern: Pattern) -> None:
        check_blocks(columns, pattern, self.block_size)

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, Tensor]:
        values, mask = self._solve(weight, inputs, pattern)
        return mask, values

    def update(self, weight: Tensor, inputs: Inputs, mask: Tensor) -> Tensor:
        return self._solve(weight, inputs, mask)[0]

    def _solve(self, weight: Tensor, inputs: Inputs, chosen: Pattern | Tensor) -> tuple[Tensor, Tensor]:
        assert inputs.hessian is not None
        return sparsegpt(weight, inputs.hessian, chosen, damp=self.damp, block_size=self.block_size)


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    chosen: Pattern | Tensor,
    *,
    damp: float = DAMP,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Prune W and update what is kept, so that W X changes little (Algorithm 1).

    Args:
        weight: (out, in); not written to.
        hessian: (in, in), 2/n X X^T of the site's inputs over n samples; a common factor matters only beside
            inputs that never came, whose diagonal counts as 1.
        chosen: a pattern, whose mask is chosen on the way, or the mask itself, (out, in) bool.
        damp, block_size: see `SparseGpt`.

    Returns:
        The new weight (out, in) in float32, zero where it was pruned, and the mask, true where it was kept.

    Raises:
        PatternError: in is not a multiple of M, or the damped Hessian is not positive definite.
        UsageError: a block that no whole number of groups fills.
    """
    columns = weight.shape[1]
    if isinstance(chosen, NM) and columns % chosen.group:
        raise PatternError(
            f"its {columns} inputs are not a multiple of {chosen.group}, so {chosen} cannot hold"
        )
    check_blocks(columns, chosen, block_size)
    w = weight.to(torch.float32, copy=True)
    inverse = _inverse_factor(hessian.to(torch.float32, copy=True), w, damp)
    kept = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, block_size):
        block = slice(start, min(start + block_size, columns))
        if isinstance(chosen, Tensor):
            here = chosen[:, block]
        elif isinstance(chosen, NM):
            here = chosen
        else:  # what blocks round off does not add up
            before, after = (int(chosen.share * len(w) * stop) for stop in (start, block.stop))
            here = after - before
        errors, kept[:, block] = _prune_block(w[:, block], inverse[block, block], here)
        w[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return w, kept


def check_blocks(columns: int, chosen: Pattern | Tensor, block_size: int) -> None:
    """UsageError if a block would end within a group."""
    if isinstance(chosen, NM) and block_size < columns and block_size % chosen.group:
        raise UsageError(
            f"sparsegpt: a block of {block_size} columns is not a whole number of groups of {chosen}; "
            f"give --block-size {max(1, block_size // chosen.group) * chosen.group}"
        )


def _inverse_factor(hessian: Tensor, w: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; inputs that never came clear their column."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    w[:, dead] = 0
    diagonal += damp * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not int(failed):
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(failed):
        raise PatternError(
            f"its Hessian is not positive definite with damp {damp:g}; raise --damp, or calibrate on more text"
        )
    return factor


def _prune_block(w: Tensor, inverse: Tensor, chosen: NM | Tensor | int) -> tuple[Tensor, Tensor]:
    """Prune the columns of a block in place; their scaled errors, and what was kept.

    `chosen` is a pattern of groups, a mask, or how many entries are dropped.
    """
    errors = torch.zeros_like(w)
    scale = inverse.diagonal() ** 2
    if isinstance(chosen, Tensor):
        kept = chosen
    elif isinstance(chosen, NM):
        kept = torch.ones_like(w, dtype=torch.bool)
    else:
        kept = keep_all_but(w**2 / scale, chosen)
    for i in range(w.shape[1]):
        if isinstance(chosen, NM) and i % chosen.group == 0:
            group = slice(i, i + chosen.group)
            kept[:, group] = keep_of_groups(w[:, group] ** 2 / scale[group], chosen)
        column = w[:, i].clone()
        w[:, i] *= kept[:, i]
        errors[:, i] = (column - w[:, i]) / inverse[i, i]
        w[:, i + 1 :] -= errors[:, i : i + 1] * inverse[i, i + 1 :]
    return errors, kept
