"""Graph surgery: replace nodes, find what reads a weight, and drop what nothing uses any more."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from spp_fx.errors import PreconditionError

aten = torch.ops.aten
VIEWS = (aten.t.default, aten.transpose.int)
"""The ops that turn a stored weight into its canonical orientation."""


def replace_node(node: fx.Node, by: fx.Node, **meta: Any) -> None:
    """Erase a node; what used it uses `by`, which takes its meta."""
    by.meta = node.meta | meta
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def erase_unused(graph: fx.Graph) -> None:
    """Erase every node that nothing uses, whatever its op may do."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from."""
    found: set[fx.Node] = set()
    left = [*node.all_input_nodes]
    while left:
        if (each := left.pop()) not in found:
            found.add(each)
            left += each.all_input_nodes
    return found


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
    kinds = map(_weight_like, arguments)
    examples = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
    traced = make_fx(function)(*examples)
    inputs = (node for node in traced.graph.nodes if node.op == "placeholder")
    values: dict[fx.Node, fx.Node] = dict(zip(inputs, arguments, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            values[inner] = graph.node_copy(inner, lambda n: values[n])
        elif inner.op != "placeholder":
            break
    return values[traced.graph.output_node().args[0]]  # type: ignore[index]


def _weight_like(node: fx.Node) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a parameter or of a transposed view of one."""
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert module is not None
        value = module.get_parameter(str(node.target))
        return value.shape, value.dtype
    size, dtype = _weight_like(node.args[0])  # type: ignore[arg-type]
    if node.target in VIEWS:
        return torch.Size((*size[:-2], size[-1], size[-2])), dtype
    raise PreconditionError(f"{node.format_node()} is not a canonical weight")
