"""A model kept as it was: what a forward may write to is saved before it runs and restored after it."""

import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def untouched(model: nn.Module) -> Generator[None, None, None]:
    """Restore everything that is reached from a model's attributes, also after an error.

    Saved are the attributes of every submodule (tables of parameters, buffers, submodules and hooks among
    them), of configurations and other objects that they hold, and dicts, lists, sets and deques at any
    depth: each keeps its identity and gets its items back. Tensors that are neither parameters nor buffers
    get their bytes back; torch.export computes on stand-ins of parameters and buffers, so that saving a
    model takes no memory for weights.
    """
    restores = _saved(model)
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _saved(model: nn.Module) -> list[Callable[[], object]]:
    """Functions that restore the contents of every object that is reached from a model."""
    storages = {_storage_key(t) for t in (*model.parameters(), *model.buffers()) if _has_bytes(t)}
    seen: dict[int, Any] = {}  # holds the objects: an id is an object's own only while that lives
    waiting: list[Any] = [model]
    restores: list[Callable[[], object]] = []
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if _has_bytes(value) and (key := _storage_key(value)) not in storages:
                storages.add(key)
                storage = value.untyped_storage()
                restores.append(partial(storage.copy_, storage.clone()))
            continue
        if isinstance(value, dict):
            waiting.extend(cast("dict[Any, Any]", value).values())
        elif isinstance(value, list | deque | tuple | frozenset):
            waiting.extend(cast("list[Any]", value))
        if isinstance(value, dict | list | deque | set):
            restores.append(_restore_items(value))
        if _has_own_attributes(value):
            waiting.append(vars(value))
    return restores


def _restore_items(value: Any) -> Callable[[], None]:
    """A function that puts the items of a dict, list, deque or set back if they have changed."""

    def items() -> list[Any]:
        return list(value.items() if isinstance(value, dict) else value)

    def same(first: Any, second: Any) -> bool:
        return all(map(operator.is_, first, second)) if isinstance(value, dict) else first is second

    def restore() -> None:
        now = items()
        if len(now) == len(kept) and all(map(same, now, kept)):
            return
        # The plain methods of dicts: subclasses (transformers' ModelOutput) forbid theirs.
        plain: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        if not isinstance(value, dict):
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(kept)
            return
        plain.clear(value)
        for key, item in kept:
            plain.__setitem__(value, key, item)

    kept = items()
    return restore


def _has_own_attributes(value: Any) -> bool:
    """Whether a forward may write to an object's attributes: not those of classes, functions, Python or torch."""
    if not hasattr(value, "__dict__") or isinstance(value, type | ModuleType) or hasattr(value, "__code__"):
        return False
    home = type(value).__module__.partition(".")[0]
    return isinstance(value, nn.Module) or (home != "torch" and home not in sys.stdlib_module_names)


def _has_bytes(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and not isinstance(tensor, FakeTensor)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
    )


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
