"""Weights that show what code does with them: which of their entries are multiplied by what."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from spp_fx.graph.flow import CASTS, LOOKUPS, MOVES, PARTS, contractions

aten = torch.ops.aten

Show = Callable[["Followed", Any, int, int, tuple[Any, ...], dict[str, Any]], None]
"""Called with a weight, the op that reads it, its position among the operands, the dimension of it that is summed
(None for an op that is not a product), and the op's arguments."""


class Followed(Tensor):
    """A weight, or what was made of one by moving entries, that shows the products that it enters.

    Attributes:
        value: the tensor itself.
        key: of the weight.
        places: for each dimension of the weight, the index in it of every entry of `value`.
        show: see `Show`.
    """

    value: Tensor
    key: Any
    places: list[Tensor]
    show: Any

    @staticmethod
    def __new__(cls: Any, value: Tensor, key: Any, places: list[Tensor], show: Any) -> "Followed":
        made = cast(Any, Tensor)._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device, requires_grad=False
        )
        made.value, made.key, made.places, made.show = value, key, places, show
        return made

    @classmethod
    def whole(cls, value: Tensor, key: Any, show: Any) -> "Followed":
        places = [
            torch.arange(n, dtype=torch.int32, device=value.device)
            .view(n, *(1,) * (value.ndim - 1 - d))
            .expand(value.shape)
            for d, n in enumerate(value.shape)
        ]
        return cls(value, key, places, show)

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        followed = [each for each in flat if isinstance(each, Followed)]
        first = followed[0]

        def run(which: Callable[[Followed], Tensor]) -> Any:
            new_args, new_kwargs = tree_map_only(Followed, which, (args, kwargs))
            return func(*new_args, **new_kwargs)

        def place(dim: int) -> Any:
            try:
                return run(lambda each: each.places[dim])
            except RuntimeError:  # a view that only the weight's own strides allow
                return run(lambda each: each.places[dim].contiguous())

        value = run(lambda each: each.value)
        if func in CASTS:
            return cls(value, first.key, first.places, first.show)
        if func in _MOVES and all(each.key == first.key for each in followed):
            places = [place(dim) for dim in range(len(first.places))]
            if isinstance(value, Tensor):
                return cls(value, first.key, places, first.show)
            return [
                cls(each, first.key, [each_dim[i] for each_dim in places], first.show)
                for i, each in enumerate(value)
            ]
        summed = products().get(func, {}) if len(followed) == 1 else {}
        position = next((i for i, each in enumerate(args) if each is first), -1)
        first.show(first, func, position, summed.get(position), args, kwargs)
        return value


_MOVES = {
    *MOVES, *LOOKUPS, *(op for op in PARTS if op not in (aten.constant_pad_nd.default, aten.pad.default)),
    *(aten.select.int, aten.unbind.int, aten.stack.default, aten.clone.default, aten.squeeze_.default),
} - {*CASTS}  # fmt: skip


def products() -> dict[object, dict[int, int]]:
    return contractions() | {aten.mv.default: {0: -1, 1: -1}, aten.addmv.default: {1: -1, 2: -1}}


def is_transposed(weight: Followed, summed: int) -> bool | str:
    """Whether a weight is stored (in, out), by a product that sums a dimension of what was made of it."""
    shape, count = weight.value.shape, len(weight.places)
    axis = summed % len(shape)
    varies = [d for d, place in enumerate(weight.places) if _varies(place, axis)]
    if count not in (2, 3) or len(varies) != 1 or varies[0] < count - 2:
        return "is multiplied along more than its rows or its columns"
    for other in range(max(0, len(shape) - 2), len(shape)):
        if other != axis and (_varies(weight.places[varies[0]], other)):
            return "is multiplied along more than its rows or its columns"
        if count == 3 and _varies(weight.places[0], other):
            return "is multiplied by inputs of several experts at once"
    return varies[0] == count - 2


def _varies(place: Tensor, axis: int) -> bool:
    return bool((place != place.narrow(axis, 0, 1)).any())
