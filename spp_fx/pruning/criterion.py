"""What a pruning criterion is: it chooses what is kept of a weight, and may change what it keeps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.pruning.statistics import Inputs
from spp_fx.registry import Registry, naming
from spp_fx.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Criterion(ABC):
    """A frozen dataclass whose fields are its options.

    Attributes:
        name: under which it was registered.
        calibrated: it looks at inputs, `Inputs` that saw at least one token.
        hessian: it needs X^T X of the inputs as well.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = True
    hessian: ClassVar[bool] = False

    @abstractmethod
    def prune(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
        """What is kept of a weight (out, in), as a bool mask of its shape; and its new values, if they change.

        Nothing that is given is written to.

        Raises:
            PatternError: the pattern cannot hold, or the inputs cannot be used.
        """

    def update(self, weight: Tensor, inputs: Inputs, mask: Tensor) -> Tensor | None:
        """New values for a mask that something else chose; None where this criterion changes none."""
        return None


CRITERIA = Registry[type[Criterion]]("pruning method", "spp_fx.criteria", package="spp_fx.pruning.criteria")
register = naming(CRITERIA)


def make_criterion(name: str, **options: Any) -> Criterion:
    """A criterion by name; options that are None are left at their defaults.

    Raises:
        UsageError: nothing of that name is known, or it has no such option.
    """
    criterion = CRITERIA.find(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = {field.name for field in fields(criterion)}
    if odd := sorted(given.keys() - known):
        raise UsageError(
            f"{name} has no option {odd[0].replace('_', '-')}; it has: {', '.join(sorted(known)) or 'none'}"
        )
    return criterion(**given)
