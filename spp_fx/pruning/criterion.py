"""What a pruning criterion is: it chooses what is kept of a weight, and may change what it keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.pruning.inputs import Inputs
from spp_fx.sparsity import Pattern


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


CRITERIA: dict[str, type[Criterion]] = {}
C = TypeVar("C", bound=type[Criterion])


def register(name: str) -> Callable[[C], C]:
    """Make a criterion known under a name; packages of others use the entry point group `spp_fx.criteria`."""

    def add(criterion: C) -> C:
        criterion.name = name
        CRITERIA[name] = criterion
        return criterion

    return add


def make_criterion(name: str, **options: Any) -> Criterion:
    """A criterion by name; options that are None are left at their defaults.

    Raises:
        UsageError: nothing of that name is known, or it has no such option.
    """
    if name not in CRITERIA:
        for entry in entry_points(group="spp_fx.criteria"):
            entry.load()
    if name not in CRITERIA:
        raise UsageError(f"unknown pruning method '{name}'; known: {', '.join(sorted(CRITERIA))}")
    given = {key: value for key, value in options.items() if value is not None}
    known = {field.name for field in fields(CRITERIA[name])}
    if odd := sorted(given.keys() - known):
        raise UsageError(
            f"{name} has no option {odd[0].replace('_', '-')}; it has: {', '.join(sorted(known)) or 'none'}"
        )
    return CRITERIA[name](**given)
