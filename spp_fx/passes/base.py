"""What a pass is: a named, typed rewrite or check of a program that reports what it did, site by site."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from spp_fx.graph.program import Program
from spp_fx.options import check_values
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

    A field made by `choice` holds one of a registry's classes, such as an adapter method. It is spelt by its name,
    and its own fields count as options of the pass: `inject{method=spp,rank=8}`.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_values(self, self.name)

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes take any program
        """Raise PreconditionError unless the program is fit for this pass."""

    @abstractmethod
    def apply(self, program: Program) -> PassReport:
        """Rewrite or check the program in place."""

    def again(self, program: Program, first: Program) -> None:
        """Rewrite another trace of the model of `first`, which the pass has rewritten, the same way.

        `program` takes over the tensors of `first` afterwards: what it holds until then has no meaning.
        """
        self.apply(program)

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raise PostconditionError unless the pass left what it promises."""


PASSES = Registry[type[Pass]]("pass", "spp_fx.passes", "spp_fx.passes")
register = naming(PASSES)
