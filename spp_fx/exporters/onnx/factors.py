"""Which weights of a graph its matrix products multiply by, and which way round they are stored."""

from collections.abc import Iterator, Set
from typing import Any

from onnx import ModelProto, NodeProto, helper

from spp_fx.errors import FormatError


def find_factors(model: ModelProto, weights: Set[str]) -> Iterator[tuple[str, bool]]:
    """The right-hand factors of products that are weights, and whether they are stored (in, out).

    A product `x @ w` sums over the first of w's last two dimensions. Between it and the weight may stand what
    changes no number: transpositions, casts, and the choice of one matrix of a stack.

    Raises:
        FormatError: an attribute that decides about it has no value.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1:
            transposed = not (node.op_type == "Gemm" and bool(_attribute(node, "transB")))
            name = node.input[1]
            for _ in range(len(made)):  # a graph has no circles, a damaged one may
                before = made.get(name)
                if name in weights or before is None or not before.input:
                    break
                if before.op_type == "Transpose":
                    if not _swaps(before):
                        break
                    transposed = not transposed
                elif before.op_type not in ("Cast", "Gather", "Squeeze", "Identity"):
                    break
                name = before.input[0]
            if name in weights:
                yield name, transposed


def _swaps(node: NodeProto) -> bool:
    """Whether a Transpose swaps the last two dimensions and no other."""
    perm = list(_attribute(node, "perm") or ())
    return len(perm) > 1 and perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]


def _attribute(node: NodeProto, name: str) -> Any:
    try:
        return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)
    except ValueError as error:
        raise FormatError(f"{node.op_type} {node.name}: its attribute {name} has no value") from error
