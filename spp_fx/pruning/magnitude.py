"""magnitude: keep the entries of largest absolute value."""

import torch
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.sparsity import NM, Pattern, Unstructured

BLOCK_ELEMENTS = 1 << 22


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Which entries of a weight magnitude pruning keeps.

    N:M keeps the N largest |w| of every M consecutive inputs; unstructured drops the int(p * size)
    smallest of the whole matrix. Exactly so many: ties go to the entry that comes first.

    Args:
        weight: (out, in), any floating dtype.

    Returns:
        (out, in) bool, true where the entry is kept. An entry that is zero already may count as kept.

    Raises:
        PatternError: in is no multiple of M.
    """
    if isinstance(pattern, Unstructured):
        return _smallest_dropped(weight.abs().flatten(), int(pattern.share * weight.numel())).view(
            weight.shape
        )
    return _keep_n_of_m(weight, pattern)


def _keep_n_of_m(weight: Tensor, pattern: NM) -> Tensor:
    out, columns = weight.shape
    if columns % pattern.group:
        raise PatternError(f"its {columns} inputs are no multiple of {pattern.group}, {pattern} cannot hold")
    kept = torch.zeros(out, columns, dtype=torch.bool)
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, out, step):
        groups = weight[start : start + step].abs().reshape(-1, pattern.group)
        # A stable sort puts the earlier of two equals first, so the result does not depend on the kernel.
        order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.kept]
        block = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
        kept[start : start + step] = block.view(-1, columns)
    return kept


def _smallest_dropped(score: Tensor, count: int) -> Tensor:
    """All but the `count` smallest scores; among equals at the threshold the later ones are dropped."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    score = (
        score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
    )  # kthvalue lacks halves
    threshold = score.kthvalue(count).values
    dropped = score < threshold
    ties = (score == threshold).nonzero().flatten()
    dropped[ties[len(ties) - (count - int(dropped.sum())) :]] = True
    return ~dropped
