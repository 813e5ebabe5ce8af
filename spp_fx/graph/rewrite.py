"""All graph surgery: create, replace, extract and erase nodes, and find what reads a weight."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import PythonCode
from torch.fx.node import map_aggregate, map_arg

from spp_fx.errors import PreconditionError

T = TypeVar("T")

aten = torch.ops.aten
VIEWS = (aten.t.default, aten.transpose.int)
"""The ops that turn a stored weight into its canonical orientation."""


class Graph(fx.GraphModule):
    """A graph of a program, whose `recompile` leaves the graphs below it alone; that of torch compiles them again."""

    def _recompile_submodules(self) -> list[tuple[str, PythonCode]]:
        return []


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of a function at the insertion point."""
    return graph.call_function(target, args, kwargs)


def training_flag(graph: fx.Graph) -> fx.Node:
    """The `training` attribute of the graph's module, at the insertion point."""
    return graph.create_node("get_attr", "training")


def replace_node(node: fx.Node, by: fx.Node, **meta: Any) -> None:
    """Let what uses a node use `by`, which takes its meta; erase the node and what only it used."""
    by.meta = node.meta | meta
    node.replace_all_uses_with(by)
    erase_unused(node)


def replace_by_call(node: fx.Node, target: Callable[..., Any], *args: Any, **meta: Any) -> None:
    """Replace a node by a call of a function, as `replace_node` does."""
    with node.graph.inserting_before(node):
        made = call(node.graph, target, *args)
    replace_node(node, made, **meta)


def change_call(node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
    """Let a node call another function with other arguments; erase what only it used before."""
    before = node.all_input_nodes
    node.target, node.args = target, args
    erase_unused(*before)


def cast_result(node: fx.Node, dtype: torch.dtype) -> None:
    """Let what uses a node use its value cast to a dtype."""
    with node.graph.inserting_after(node):
        made = call(node.graph, aten._to_copy.default, node, dtype=dtype)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def drop_cast(node: fx.Node) -> None:
    """The inverse of `cast_result`."""
    (made,) = node.users
    made.replace_all_uses_with(node)
    erase_unused(made)


def erase_unused(*nodes: fx.Node) -> None:
    """Erase those of some nodes that nothing uses, and then what only they used; a graph's inputs stay."""
    waiting, erased = list(nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.users or node.op == "placeholder" or node in erased:
            continue
        waiting += node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)


def extract(nodes: Iterable[fx.Node], inputs: Iterable[fx.Node], result: fx.Node) -> Graph:
    """A graph of copies of `nodes`, which are in order, from `inputs` to `result`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return Graph(nn.Module(), graph, class_name="Graph")


def flatten(root: fx.GraphModule, inlined: Callable[[str], bool]) -> fx.Graph:
    """A copy of a graph with copies of graphs that it calls in the place of the calls.

    Args:
        inlined: whether the graph at a path is copied in; what calls it must be as well. Others stay calls.

    Returns:
        a graph whose targets are paths from `root`.
    """
    graph = fx.Graph()

    def copy(owner: fx.GraphModule, path: str, arguments: Iterable[Any]) -> Any:
        values: dict[fx.Node, Any] = dict(
            zip(owner.graph.find_nodes(op="placeholder"), arguments, strict=bool(path))
        )
        for node in owner.graph.nodes:
            if node in values:
                continue
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            child = f"{path}.{node.target}".lstrip(".")
            if node.op == "call_module" and inlined(child):
                given = map_arg((*node.args, *node.kwargs.values()), values.__getitem__)
                module = owner.get_submodule(str(node.target))
                values[node] = copy(cast(fx.GraphModule, module), child, given)
                continue
            several = node.target is operator.getitem and values[node.all_input_nodes[0]]
            if isinstance(several, list | tuple):
                values[node] = several[cast(int, node.args[1])]
                continue
            values[node] = made = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                made.target = child
        return None

    graph.output(copy(root, "", ()))
    return graph


def move_constants(module: fx.GraphModule, before: torch.device, after: torch.device) -> None:
    """Make the tensors that a graph itself creates on another device."""

    changed = False

    def move(argument: Any) -> Any:
        nonlocal changed
        if not isinstance(argument, torch.device) or argument != before:
            return argument
        changed = True
        return after

    for node in module.graph.nodes:
        node.args = cast("tuple[Any, ...]", map_aggregate(node.args, move))
        node.kwargs = cast("dict[str, Any]", map_aggregate(node.kwargs, move))
    if changed:
        module.recompile()


def reach(start: Iterable[T], onward: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """What is reached from some nodes or values by repeated steps, themselves included, each once."""
    waiting, seen = list(start), set[T]()
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            yield each
            waiting += onward(each)


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a weight, seen through transposed views."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user) if user.target in VIEWS else [user]
    return found


def operand_chain(node: fx.Node, parameter: str) -> tuple[list[fx.Node], int]:
    """The nodes from a parameter (the first) to a contraction `node` of it, and which operand they end in.

    Raises:
        PreconditionError: no operand leads back to the parameter by first arguments.
    """
    for position, operand in enumerate(node.args):
        chain: list[fx.Node] = []
        link = operand
        while isinstance(link, fx.Node):
            chain.insert(0, link)
            if link.op == "get_attr":
                if str(link.target).rpartition(".")[2] == parameter:
                    return chain, position
                break
            link = link.args[0] if link.args else None
    raise PreconditionError(f"{node.format_node()} does not lead back to {parameter}")


def inline(graph: fx.Graph, function: Callable[..., Tensor], arguments: Sequence[fx.Node]) -> fx.Node:
    """The aten nodes of a function of weights, traced without their numbers, at the insertion point."""
    traced = make_fx(function)(*map(_weight_like, arguments))
    inputs = traced.graph.find_nodes(op="placeholder")
    values: dict[Any, fx.Node] = dict(zip(inputs, arguments, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            values[inner] = graph.node_copy(inner, values.__getitem__)
    return values[traced.graph.output_node().args[0]]


def _weight_like(node: fx.Node) -> Tensor:
    """A contiguous tensor on the meta device, of the shape and dtype of a parameter or a transposed view of one."""
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert module is not None
        value = module.get_parameter(str(node.target))
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if node.target in VIEWS:
        return _weight_like(node.all_input_nodes[0]).transpose(-1, -2).contiguous()
    raise PreconditionError(f"{node.format_node()} is not a canonical weight")
