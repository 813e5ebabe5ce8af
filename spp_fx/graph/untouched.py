"""A model kept as it was: what a forward may write to is noted before it runs and put back after it."""

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def untouched(model: nn.Module) -> Generator[None, None, None]:
    """Put everything that hangs on a model's attributes back as it was, also after an error.

    Noted are the attributes of every submodule (tables of parameters, buffers, submodules and hooks among
    them), of configurations and other objects that they hold, and dicts, lists, sets and deques at any
    depth: each keeps its identity and gets its items back. Tensors that are neither parameters nor buffers
    get their bytes back; those of parameters and buffers stand under the care of torch.export, which
    computes on stand-ins, so that noting a model takes no memory for weights.
    """
    restores = _notes(model)
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _notes(model: nn.Module) -> list[Callable[[], None]]:
    """For each object that is reached from a model, once, what puts its contents back."""
    storages = {_storage_key(t) for t in (*model.parameters(), *model.buffers()) if _has_bytes(t)}
    seen: dict[int, Any] = {}  # holds what it names: an id is an object's own only while that lives
    waiting: list[Any] = [model]
    restores: list[Callable[[], None]] = []
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if _has_bytes(value) and (key := _storage_key(value)) not in storages:
                storages.add(key)
                restores.append(_restore_bytes(value))
            continue
        if isinstance(value, dict):
            waiting.extend(cast("dict[Any, Any]", value).values())
            restores.append(_restore_dict(cast("dict[Any, Any]", value)))
        elif isinstance(value, list | deque):
            waiting.extend(cast("list[Any]", value))
            restores.append(_restore_sequence(cast("list[Any]", value)))
        elif isinstance(value, set):
            restores.append(_restore_set(cast("set[Any]", value)))
        elif isinstance(value, tuple | frozenset):
            waiting.extend(cast("tuple[Any, ...]", value))
        if _has_own_attributes(value):
            waiting.append(vars(value))
    return restores


def _has_own_attributes(value: Any) -> bool:
    """Whether an object may keep what a forward tells it: not a class or function, nor one of Python's or torch's."""
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


def _restore_bytes(tensor: Tensor) -> Callable[[], None]:
    storage = tensor.untyped_storage()
    kept = storage.clone()

    def restore() -> None:
        storage.copy_(kept)

    return restore


def _restore_dict(value: dict[Any, Any]) -> Callable[[], None]:
    kept = list(value.items())
    # The plain methods: subclasses (transformers' ModelOutput) forbid theirs.
    plain: Any = OrderedDict if isinstance(value, OrderedDict) else dict

    def restore() -> None:
        now = list(value.items())
        if len(now) == len(kept) and all(a is c and b is d for (a, b), (c, d) in zip(now, kept, strict=True)):
            return
        plain.clear(value)
        for key, item in kept:
            plain.__setitem__(value, key, item)

    return restore


def _restore_sequence(value: list[Any]) -> Callable[[], None]:
    kept = list(value)

    def restore() -> None:
        if len(value) != len(kept) or any(a is not b for a, b in zip(value, kept, strict=True)):
            value.clear()
            value.extend(kept)

    return restore


def _restore_set(value: set[Any]) -> Callable[[], None]:
    kept = set(value)

    def restore() -> None:
        if value != kept:
            value.clear()
            value.update(kept)

    return restore
