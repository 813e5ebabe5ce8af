"""dsnot: repair a mask without training, by swapping pruned weights for kept ones (Zhang et al., 2024)."""

import torch
from torch import Tensor

from spp_fx.pruning.inputs import Inputs
from spp_fx.pruning.select import row_blocks
from spp_fx.pruning.wanda import wanda_score
from spp_fx.sparsity import NM, Pattern

THRESHOLD = 0.1
CYCLES = 50


def dsnot(weight: Tensor, mask: Tensor, inputs: Inputs, pattern: Pattern) -> Tensor:
    """The mask after at most 50 swaps in each row; every row, and every group of N:M, keeps as many as before.

    D_ij = W_ij mean_j(x) is what a weight contributes to the mean of its output, E_i = the sum of D over
    the pruned weights of row i what pruning took from it. A swap grows the pruned weight of E's sign with the
    largest |D_ij| / var_j(x), and prunes the kept weight of the other sign with the smallest Wanda score;
    for N:M in the same group, of those that have both. A row ends when |E| <= 0.1, when there is nothing to
    swap, or, for N:M, when a swap would turn the sign of E. No weight moves twice.

    Args:
        weight: (out, in), as it was before pruning.
        mask: (out, in) bool, true where it is kept.
        inputs: what calibration saw.
        pattern: that the mask holds.
    """
    group = pattern.group if isinstance(pattern, NM) else None
    repaired = mask.clone()
    for part, kept in row_blocks(weight, repaired):
        _repair(part, kept, inputs, group)
    return repaired


def _repair(weight: Tensor, mask: Tensor, inputs: Inputs, group: int | None) -> None:
    """Swap in the rows of a mask."""
    share = weight.float() * inputs.mean
    gain = share / inputs.variance.clamp_min(torch.finfo(torch.float32).tiny)
    gain[mask] = 0  # nothing to grow
    cost = wanda_score(weight, inputs.norms).masked_fill_(~mask, torch.inf)  # nothing to prune
    error = torch.where(mask, 0, share).sum(1, dtype=torch.float64)
    active = (error.abs() > THRESHOLD).nonzero().flatten()
    for _ in range(CYCLES):
        if not len(active):
            break
        sign = error[active].sign().float().unsqueeze(1)
        own = share[active]
        grows = (gain[active] * sign).clamp_min_(0)
        prunes = cost[active].masked_fill_(own * sign >= 0, torch.inf)
        grown, pruned, found = _swap(grows, prunes, group)
        change = own.gather(1, pruned) - own.gather(1, grown)
        after = error[active] + change.squeeze(1)
        if group is not None:
            found &= after.sign() == sign.squeeze(1)
        moved, grown, pruned = active[found], grown[found, 0], pruned[found, 0]
        mask[moved, grown], mask[moved, pruned] = True, False
        gain[moved, grown], cost[moved, pruned] = 0, torch.inf
        error[moved] = after[found]
        active = moved[error[moved].abs() > THRESHOLD]


def _swap(grows: Tensor, prunes: Tensor, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What each row grows and prunes, (rows, 1) each, and (rows,) whether there is such a pair."""
    if group is None:
        gain, grown = grows.max(1, keepdim=True)
        cost, pruned = prunes.min(1, keepdim=True)
        return grown, pruned, ((gain > 0) & (cost < torch.inf)).squeeze(1)
    rows = len(grows)
    costs, lanes = prunes.view(rows, -1, group).min(2)
    possible = (costs < torch.inf).repeat_interleave(group, 1)
    gain, grown = grows.masked_fill_(~possible, 0).max(1, keepdim=True)
    where = grown // group
    return grown, where * group + lanes.gather(1, where), (gain > 0).squeeze(1)
