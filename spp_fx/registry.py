"""Registries of what is chosen by name: passes, methods, criteria, formats."""

from collections.abc import Callable, Iterator, MutableMapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from spp_fx.errors import UsageError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

BUILT_IN = {
    "spp_fx.methods": {"spp": "spp_fx.adapters.spp", "sqft": "spp_fx.adapters.sqft"},
    "spp_fx.criteria": {
        "magnitude": "spp_fx.pruning.criteria.magnitude",
        "ria": "spp_fx.pruning.criteria.ria",
        "sparsegpt": "spp_fx.pruning.criteria.sparsegpt",
        "wanda": "spp_fx.pruning.criteria.wanda",
    },
    "spp_fx.formats": {
        "cusparselt": "spp_fx.exporters.cusparselt",
        "cutlass": "spp_fx.exporters.cutlass",
        "onnx": "spp_fx.exporters.onnx",
        "onnx-dense": "spp_fx.exporters.onnx",
        "onnx-packed": "spp_fx.exporters.onnx",
        "safetensors": "spp_fx.exporters.plain",
        "sparse-bitmask": "spp_fx.exporters.sparse_bitmask",
    },
    "spp_fx.passes": {
        "canonicalize": "spp_fx.passes.canonicalize",
        "causal": "spp_fx.passes.causal",
        "checkpoint": "spp_fx.passes.partition",
        "fold": "spp_fx.passes.fold_adapters",
        "inject": "spp_fx.passes.inject_adapters",
        "lower": "spp_fx.passes.lower",
        "match": "spp_fx.passes.match",
        "partition": "spp_fx.passes.partition",
        "prune": "spp_fx.passes.prune_sites",
        "shard": "spp_fx.passes.shard",
        "verify": "spp_fx.passes.verify_masks",
    },
}
"""Names that are built in: the module that registers each, by the group of entry points that adds to them."""


class Registry(MutableMapping[str, T]):
    """Values by name: registered, built in, or from another package.

    A module is imported when a name of it is looked up. The built-in ones are all imported when the registry is
    iterated; entry points of other packages are loaded before a name counts as unknown.

    Args:
        what: a word for one of them, in messages.
        group: in `BUILT_IN`, and of the entry points of other packages.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what = what
        self._group = group
        self._known: dict[str, T] = {}

    def find(self, name: str) -> T:
        """What has a name; UsageError lists what is known."""
        if name not in self:
            for entry in entry_points(group=self._group):
                _load(entry, self.what)
        if name not in self:
            raise UsageError(f"unknown {self.what} '{name}'; known: {', '.join(sorted(self))}")
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._known and (module := BUILT_IN[self._group].get(name)):
            import_module(module)
        return self._known[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._known[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        for module in BUILT_IN[self._group].values():
            import_module(module)
        return iter(self._known)

    def __len__(self) -> int:
        return len(list(iter(self)))


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
