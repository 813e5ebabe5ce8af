"""Things known by a name: passes, methods, criteria, formats; packages of others add theirs by entry points."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from spp_fx.errors import UsageError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(dict[str, T], Generic[T]):
    """What is known, by name.

    Args:
        what: a word for one of them, in messages.
        group: the entry points that are loaded before a name is called unknown.
    """

    def __init__(self, what: str, group: str) -> None:
        super().__init__()
        self._what = what
        self._group = group

    def find(self, name: str) -> T:
        """What has a name; UsageError lists what is known."""
        if name not in self:
            for entry in entry_points(group=self._group):
                _load(entry, self._what)
        if name not in self:
            raise UsageError(f"unknown {self._what} '{name}'; known: {', '.join(sorted(self))}")
        return self[name]


def _load(entry: EntryPoint, what: str) -> None:
    try:
        entry.load()
    except ImportError as error:
        package = entry.dist.name if entry.dist else "a package"
        raise UsageError(f"{what} '{entry.name}' of {package} cannot be imported: {error}") from error


def naming(registry: Registry[Any]) -> Callable[[str], Callable[[C], C]]:
    """The decorator `register(name)` of classes, which gives them their name and makes them known."""

    def register(name: str) -> Callable[[C], C]:
        def add(cls: C) -> C:
            cls.name = name
            registry[name] = cls
            return cls

        return add

    return register
