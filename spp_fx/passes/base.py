"""What a pass is: a named, typed rewrite or check of a program that reports what it did, site by site."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from spp_fx.graph.program import Program
from spp_fx.registry import Registry, naming


@dataclass(frozen=True)
class PassReport:
    """What a pass did.

    Attributes:
        changed: sites treated, each with a short note.
        skipped: sites left alone, each with its reason.
    """

    changed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its options; `name{field=value,...}` is its spelling.

    A pass that is given the name of something with options of its own (a criterion, a method) has a field
    `options`, a mapping of them; they are spelt like the pass's own fields.
    """

    name: ClassVar[str]

    @classmethod
    def chosen(cls, given: Mapping[str, Any]) -> type | None:
        """The dataclass whose fields `options` may hold, by the other fields that are given."""
        return None

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes take any program
        """Raise PreconditionError unless the program is fit for this pass."""

    @abstractmethod
    def apply(self, program: Program) -> PassReport:
        """Rewrite or check the program in place."""

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raise PostconditionError unless the pass left what it promises."""


PASSES = Registry[type[Pass]]("pass", "spp_fx.passes", package="spp_fx.passes")
register = naming(PASSES)


def find_pass(name: str) -> type[Pass]:
    """A pass by name; UsageError lists what is known."""
    return PASSES.find(name)
