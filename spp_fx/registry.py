"""Registries of what is chosen by name: passes, methods, criteria, formats."""

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from spp_fx.errors import UsageError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

_REGISTERED = re.compile(r'^@register\("([^"]+)"\)', re.MULTILINE)


class Registry(MutableMapping[str, T]):
    """Values by name: registered, built in, or from another package.

    A module is imported when a name of it is looked up. The built-in ones are all imported when the registry is
    iterated; entry points of other packages are loaded before a name counts as unknown.

    Args:
        what: a word for one of them, in messages.
        group: the entry point group of other packages.
        package: whose modules register the built-in ones.
    """

    def __init__(self, what: str, group: str, package: str) -> None:
        self.what = what
        self._group = group
        self._package = package
        self._known: MutableMapping[str, T] = {}

    @cached_property
    def built_in(self) -> dict[str, str]:
        """Which module of the package registers a name.

        Read from the decorators `@register("name")` in the sources, so that nothing has to list them and nothing is
        imported: some modules import torch, or compilers that are not installed.
        """
        folder = Path(import_module(self._package).__path__[0])
        found: dict[str, str] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join((self._package, *parts)).removesuffix(".__init__")
            found |= dict.fromkeys(_REGISTERED.findall(path.read_text(encoding="utf-8")), module)
        return found

    def find(self, name: str) -> T:
        """What has a name; UsageError lists what is known."""
        if name not in self:
            for entry in entry_points(group=self._group):
                _load(entry, self.what)
        if name not in self:
            raise UsageError(
                f"unknown {self.what} '{name}'; known: {', '.join(sorted(self))}{did_you_mean(name, self) or '.'} If a "
                f"package brings it, install the package (entry points {self._group})"
            )
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._known and (module := self.built_in.get(name)):
            import_module(module)
        return self._known[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        for module in self.built_in.values():
            import_module(module)
        return iter(self._known)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def extended(self, what: str, **more: T) -> "Registry[T]":
        """A registry of these and more names, for one choice."""
        both = Registry[T](what, self._group, self._package)
        both._known = ChainMap(more, self)
        return both


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known ones that are spelled much like it, if any."""
    from difflib import get_close_matches  # takes milliseconds, and most runs have no wrong name

    near = get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _load(entry: EntryPoint, what: str) -> None:
    try:
        entry.load()
    except (ImportError, SyntaxError) as error:
        package = entry.dist.name if entry.dist else "a package"
        raise UsageError(f"{what} '{entry.name}' of {package} cannot be imported: {error}") from error


def naming(registry: Registry[Any]) -> Callable[[str], Callable[[C], C]]:
    """The decorator `register(name)` of classes, which sets their `name` and registers them."""

    def register(name: str) -> Callable[[C], C]:
        def add(cls: C) -> C:
            cls.name = name
            registry[name] = cls
            return cls

        return add

    return register
