"""The model's own dropout in a program: the probabilities it has while training, behind a `training` flag.

A model is exported in eval mode, which bakes the dropout of attention weights in as 0. So the model runs once more on
fake tensors in training mode, and its calls of dropout are recorded; everything else of the program is its eval path.
"""

import inspect
import operator
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from spp_fx.graph.flow import argument
from spp_fx.graph.rewrite import call, training_flag

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
# Functions of torch.nn.functional -> their op, and the one that writes to its input.
_FUNCTIONS = {
    "dropout": (aten.dropout.default, aten.dropout_.default),
    "dropout1d": (aten.feature_dropout.default, aten.feature_dropout_.default),
    "dropout2d": (aten.feature_dropout.default, aten.feature_dropout_.default),
    "dropout3d": (aten.feature_dropout.default, aten.feature_dropout_.default),
    "alpha_dropout": (aten.alpha_dropout.default, aten.alpha_dropout_.default),
    "feature_alpha_dropout": (aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default),
}
# Ops that drop -> the name of their probability.
_PROBABILITIES = {ATTENTION: "dropout_p"} | {op: "p" for ops in _FUNCTIONS.values() for op in ops}


@dataclass(frozen=True)
class Dropout:
    """A call of an op that drops, by a module of a model."""

    op: object
    module: nn.Module
    p: float


def has_dropout(config: dict[str, Any]) -> bool:
    """Whether any option of a configuration, or of one in it, makes a model drop while it trains."""
    return any(
        has_dropout(value)
        if isinstance(value, dict)
        else "drop" in str(key) and isinstance(value, float) and value > 0
        for key, value in config.items()
    )


@contextmanager
def recorded_dropout(model: nn.Module) -> Generator[list[Dropout], None, None]:
    """Calls of dropout by a model that runs in here, in order; nothing is dropped.

    What other threads call is left as it is: leaves are tried in one, and drop by themselves.
    """
    calls: list[Dropout] = []
    thread = get_ident()

    own, running = set(model.modules()), [model]
    attend = nn.functional.scaled_dot_product_attention

    def recorder(name: str) -> Callable[..., Tensor]:
        plain, (op, op_) = getattr(nn.functional, name), _FUNCTIONS[name]
        signature = inspect.signature(plain)

        def dropout(*args: Any, **options: Any) -> Tensor:
            if get_ident() != thread:
                return plain(*args, **options)
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            p = bound.arguments["p"] if bound.arguments["training"] else 0.0
            calls.append(Dropout(op_ if bound.arguments["inplace"] else op, running[-1], p))
            return plain(**bound.arguments | {"training": False})

        return dropout

    def attention(*args: Any, dropout_p: float = 0.0, **options: Any) -> Tensor:
        if get_ident() != thread:
            return (
                attend(*args, dropout_p=dropout_p, **options) if len(args) < 5 else attend(*args, **options)
            )
        calls.append(Dropout(ATTENTION, running[-1], args[4] if len(args) > 4 else dropout_p))
        return attend(*args[:4], *(0.0 for _ in args[4:5]), *args[5:], **options)

    def enter(module: nn.Module, _: Any) -> None:
        if module in own:
            running.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module in own:
            running.pop()

    with ExitStack() as stack:
        stack.enter_context(register_module_forward_pre_hook(enter))
        stack.enter_context(register_module_forward_hook(leave, always_call=True))
        instead = {name: recorder(name) for name in _FUNCTIONS} | {"scaled_dot_product_attention": attention}
        for name, function in instead.items():
            stack.enter_context(patch.object(nn.functional, name, function))
        yield calls


def write_dropout(exported: ExportedProgram, model: nn.Module, calls: list[Dropout]) -> bool:
    """Give the dropout in a graph the probabilities of the calls; False where those are not the graph's."""
    nodes = [node for node in exported.graph.nodes if node.target in _PROBABILITIES]
    called = [(each.op, each.module) for each in calls]
    if called != [(node.target, _owner(node, model)) for node in nodes]:
        return False
    for node, each in zip(nodes, calls, strict=True):
        _set_dropout(node, each.p, training=False)
    return True


def _owner(node: fx.Node, model: nn.Module) -> nn.Module:
    """The innermost module that a node is of, by its path, which may go through a slice of a list of modules.

    One that is called n times has the path p, p@1, ...
    """
    *_, (path, _) = node.meta["nn_module_stack"].values()
    module: Any = model
    for part in filter(None, re.sub(r"@\d+", "", path).split(".")):
        bounds = re.fullmatch(r"slice\((.+), (.+), (.+)\)", part)
        if bounds is None:
            module = module.get_submodule(part)
        else:
            module = module[slice(*(None if bound == "None" else int(bound) for bound in bounds.groups()))]
    return module


def open_dropout(graph: fx.Graph) -> None:
    """Make dropout follow the `training` flag of the graph module."""
    for node in list(graph.nodes):
        if node.target in _PROBABILITIES and (p := argument(node, _PROBABILITIES[node.target])) != 0:
            with graph.inserting_before(node):
                training = training_flag(graph)
                share = call(graph, operator.mul, p, training) if node.target == ATTENTION else p
            _set_dropout(node, share, training=training)


def _set_dropout(node: fx.Node, p: Any, *, training: Any) -> None:
    if node.target == ATTENTION:
        options = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p")}
        node.args = (*node.args[:3], argument(node, "attn_mask"), p, *node.args[5:])
        node.kwargs = options
    else:
        node.args = (node.args[0], p, training)
