"""Pruning criteria: which entries of a weight are kept."""

from collections.abc import Callable

from torch import Tensor

from spp_fx.pruning.magnitude import magnitude_mask
from spp_fx.sparsity import Pattern

WEIGHT_CRITERIA: dict[str, Callable[[Tensor, Pattern], Tensor]] = {"magnitude": magnitude_mask}
"""Criteria that look at the weight alone, by name."""

__all__ = ["WEIGHT_CRITERIA", "magnitude_mask"]
