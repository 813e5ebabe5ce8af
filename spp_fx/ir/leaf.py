"""Python functions as nodes of a graph."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch.overrides import handle_torch_function, has_torch_function

F = TypeVar("F", bound=Callable[..., Any])


def leaf(function: F) -> F:
    """Make every fx tracer take a call as one node instead of looking inside.

    A pickled graph module is traced again where it is read, from generated code; `fx.wrap` sees only calls
    by a module's global name, and a look inside would fix what the function decides when it runs.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
