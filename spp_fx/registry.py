"""Registries of what is chosen by name: passes, methods, criteria, formats."""

import pkgutil
import re
from collections.abc import Callable, Iterator, MutableMapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar

from spp_fx.errors import UsageError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

_CALL = re.compile(r"(?<!def )\bregister\(")


class Registry(MutableMapping[str, T]):
    """What is known by name: registered, built in, or brought by another package.

    Nothing lists what is built in: a module of `package` whose source calls `register(` is imported when its
    name is looked up, and all of them are when the registry is iterated. Entry points of other packages are
    loaded before a name counts as unknown.

    Args:
        what: a word for one of them, in messages.
        group: the entry point group of other packages.
        package: the package of the built-in ones.
    """

    def __init__(self, what: str, group: str, package: str) -> None:
        self.what = what
        self._group = group
        self._package = package
        self._known: dict[str, T] = {}

    def find(self, name: str) -> T:
        """What has a name; UsageError lists what is known."""
        if name not in self._known and (module := name.replace("-", "_")) in self._modules:
            import_module(f"{self._package}.{module}")
        if name not in self:
            for entry in entry_points(group=self._group):
                _load(entry, self.what)
        if name not in self:
            raise UsageError(f"unknown {self.what} '{name}'; known: {', '.join(sorted(self))}")
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            self._import_all()
        return self._known[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(self._known)

    def __len__(self) -> int:
        self._import_all()
        return len(self._known)

    def _import_all(self) -> None:
        for module in self._modules:
            import_module(f"{self._package}.{module}")

    @cached_property
    def _modules(self) -> list[str]:
        """The modules of the package that register something, found without importing them."""
        found: list[str] = []
        folder = getattr(find_spec(self._package), "submodule_search_locations", None)
        for info in pkgutil.iter_modules(folder):
            spec = find_spec(f"{self._package}.{info.name}")
            source = spec.loader.get_source(spec.name) if spec and spec.loader else None  # type: ignore[attr-defined]
            if _CALL.search(source or ""):
                found.append(info.name)
        return found


def _load(entry: EntryPoint, what: str) -> None:
    try:
        entry.load()
    except ImportError as error:
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
