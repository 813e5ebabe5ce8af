"""What verify asks of an artifact, besides its lock and another artifact: patterns, and what must be sparse."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from spp_fx.ir.names import is_target
from spp_fx.sparsity import Pattern, parse_pattern

Coverage = Literal["lock", "all"]


@dataclass(frozen=True)
class Rule:
    """A pattern of some sites.

    Attributes:
        sites: last words of module names (`down_proj`) or globs over whole names (`*.mlp.*`).
    """

    sites: tuple[str, ...]
    pattern: Pattern


@dataclass(frozen=True)
class Demands:
    """What is asked of sites; names are given as in `Rule.sites`.

    Attributes:
        pattern: asked of every site of which no rule speaks.
        rules: the first one that names a site says its pattern. A name that matches nothing is a failure.
        require: sites that must be sparse. A name that matches nothing is a failure.
        allow_dense: sites of which neither pattern nor sparsity is asked. A lock that names one still holds.
        coverage: `all` asks that every site of the model is in the lock (without a lock: is sparse) and that
            no weight is left unread, but for those of `allow_dense`.
    """

    pattern: Pattern | None = None
    rules: tuple[Rule, ...] = ()
    require: tuple[str, ...] = ()
    allow_dense: tuple[str, ...] = ()
    coverage: Coverage = "lock"

    @classmethod
    def of(
        cls,
        pattern: str | None = None,
        *,
        rules: Iterable[tuple[Iterable[str], str]] = (),
        require: Iterable[str] = (),
        allow_dense: Iterable[str] = (),
        coverage: Coverage = "lock",
    ) -> Self:
        """Demands with patterns as users write them; UsageError for one that is none."""
        return cls(
            parse_pattern(pattern) if pattern is not None else None,
            tuple(Rule(tuple(sites), parse_pattern(text)) for sites, text in rules),
            tuple(require),
            tuple(allow_dense),
            coverage,
        )

    @property
    def any(self) -> bool:
        """Whether anything is asked that an artifact without a lock can be held to."""
        return bool(self.pattern or self.rules or self.require) or self.coverage == "all"

    def pattern_of(self, name: str) -> Pattern | None:
        """The pattern asked of a site."""
        for rule in self.rules:
            if named(name, rule.sites):
                return rule.pattern
        return self.pattern


def named(name: str, targets: Iterable[str]) -> bool:
    """Whether one of several targets names a site."""
    return any(is_target(name, target) for target in targets)
