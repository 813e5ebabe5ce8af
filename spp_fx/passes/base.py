"""What a pass is: a named, typed rewrite or check of a program that reports what it did, site by site."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar

from spp_fx.errors import UsageError
from spp_fx.ir.program import Program


@dataclass(frozen=True)
class PassReport:
    """What a pass did.

    Attributes:
        changed: sites treated, each with a short note.
        refused: sites left alone, each with its reason.
    """

    changed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its options; `name{field=value,...}` is its spelling."""

    name: ClassVar[str]

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes take any program
        """Raise PreconditionError unless the program is fit for this pass."""

    @abstractmethod
    def apply(self, program: Program) -> PassReport:
        """Rewrite or check the program in place."""

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raise PostconditionError unless the pass left what it promises."""


PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register(name: str) -> Callable[[P], P]:
    """Make a pass known under a name; packages of others use the entry point group `spp_fx.passes`."""

    def add(cls: P) -> P:
        cls.name = name
        PASSES[name] = cls
        return cls

    return add


def find_pass(name: str) -> type[Pass]:
    """A pass by name; UsageError lists what is known."""
    if name not in PASSES:
        for entry in entry_points(group="spp_fx.passes"):
            entry.load()
    if name not in PASSES:
        raise UsageError(f"unknown pass '{name}'; known: {', '.join(sorted(PASSES))}")
    return PASSES[name]
