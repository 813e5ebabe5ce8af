"""What a pruning criterion is: a score of entries, and optionally new values for those that are kept."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.options import check_options, check_values
from spp_fx.pruning.select import keep, row_blocks
from spp_fx.pruning.statistics import Inputs
from spp_fx.registry import Registry, naming
from spp_fx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Criterion:
    """A frozen dataclass whose fields are its options, made by `options.option`.

    A criterion defines `score`, or `prune` where it is not a choice by scores; everything else has a default.

    Attributes:
        name: under which it was registered.
        calibrated: needs input statistics: `Inputs` of at least one token.
        hessian: it needs X^T X of the inputs as well.
        by_row: an entry competes with those of its row alone, and its score depends on no other row; else
            unstructured patterns are chosen from the whole matrix.
        reorders: inputs may change places, to where `score` keeps more in the groups of an N:M pattern.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = True
    hessian: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self, self.name)

    @property
    def reorders(self) -> bool:
        return False

    def check(self, columns: int, pattern: Pattern) -> None:
        """Raise UsageError if a weight with this many inputs cannot be pruned to a pattern with these options."""

    def score(self, weight: Tensor, inputs: Inputs) -> Tensor:
        """A number for every entry of a weight (out, in): the largest are kept, among equals the earlier."""
        raise NotImplementedError(f"{type(self).__name__} must define score or prune")

    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
        """What is kept of a weight (out, in), as a bool mask of its shape; and its new values, if they change.

        Nothing that is given is written to.

        Raises:
            PatternError: the pattern cannot hold, or the inputs cannot be used.
        """
        if not self.by_row:
            return keep(self._checked_score(weight, inputs), pattern, by_row=False), None
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for rows, target in row_blocks(weight, mask):
            target.copy_(keep(self._checked_score(rows, inputs), pattern, by_row=True))
        return mask, None

    def _checked_score(self, weight: Tensor, inputs: Inputs) -> Tensor:
        score = self.score(weight, inputs)
        if score.shape != weight.shape:
            raise PatternError(
                f"{self.name}: the score has shape {list(score.shape)}, the weight {list(weight.shape)}"
            )
        if bool(score.isnan().any()):
            raise PatternError(f"{self.name}: the score of an entry is NaN")
        return score

    def update(self, weight: Tensor, inputs: Inputs, mask: Tensor) -> Tensor | None:
        """New values for a mask that something else chose; None where this criterion changes none."""
        return None


CRITERIA = Registry[type[Criterion]]("pruning method", "spp_fx.criteria", "spp_fx.pruning.criteria")
register = naming(CRITERIA)


def make_criterion(name: str, **options: Any) -> Criterion:
    """A criterion by name with its options; UsageError for an unknown name, or an option that it does not have."""
    check_options(CRITERIA, name, options)
    return CRITERIA.find(name)(**options)
