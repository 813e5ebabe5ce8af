"""bfloat16 in graphs for onnxruntime on a CPU, which has the type but, apart from Cast, no operators for it.

A model that computes in another type may still round somewhere to bfloat16, as Falcon does with its alibi
biases. Its operators on bfloat16 become float32 operators between casts: what torch does on a CPU, to the bit
for operators that work element by element. A model that is bfloat16 as a whole is left as it is, for runtimes
that have the type; its float32 twin shows that graph and weights are right.
"""

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def compute_in_float32(model: ModelProto, given: Iterable[ValueInfoProto]) -> None:
    """Let every operator on bfloat16 work in float32 between casts; the values between them stay bfloat16.

    Args:
        model: changed in place; inputs, outputs and constants keep their types.
        given: the values that the graph reads and does not hold yet, such as its parameters.
    """
    typed = ModelProto()
    typed.CopyFrom(model)
    typed.graph.input.extend(given)
    inferred = onnx.shape_inference.infer_shapes(typed)
    _between_casts(model.graph, inferred.graph, {})


def _between_casts(graph: GraphProto, inferred: GraphProto, outer: Mapping[str, int]) -> None:
    types = dict(outer) | _types(inferred)
    nodes: list[NodeProto] = []
    wide: dict[str, str] = {}  # a bfloat16 value -> the same in float32
    for node, twin in zip(list(graph.node), inferred.node, strict=True):
        bodies = list(zip(_bodies(node), _bodies(twin), strict=True))
        for body, inferred_body in bodies:
            _between_casts(body, inferred_body, types)
        narrow = {name for name in (*node.input, *node.output) if types.get(name) == BFLOAT16}
        if bodies or node.op_type in ("Cast", "Identity") or not narrow:
            nodes.append(node)
            continue
        for at, name in enumerate(node.input):
            if name in narrow:
                if name not in wide:
                    wide[name] = f"{name}.float32"
                    nodes.append(_cast(name, wide[name], FLOAT))
                node.input[at] = wide[name]
        _widen_attributes(node)
        rounded = {at: name for at, name in enumerate(node.output) if name in narrow}
        for at, name in rounded.items():
            node.output[at] = f"{name}.unrounded"
        nodes.append(node)
        nodes += [_cast(f"{name}.unrounded", name, BFLOAT16) for name in rounded.values()]
    changed = GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(changed.node)


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.Cast", to=to)


def _types(graph: GraphProto) -> dict[str, int]:
    """Element types of the values of a graph, as far as they are known."""
    values = {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.HasField("tensor_type")
    }
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _widen_attributes(node: NodeProto) -> None:
    """Let a node make float32 where its attributes say bfloat16."""
    for attribute in node.attribute:
        says_type = attribute.name == "dtype" or (node.op_type == "Cast" and attribute.name == "to")
        if says_type and attribute.i == BFLOAT16:
            attribute.i = FLOAT
        elif attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)


def _widen_tensor(tensor: TensorProto) -> None:
    """The same numbers in float32, which is exact. Its data must lie in the graph."""
    if tensor.data_type == BFLOAT16:
        name = tensor.name
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("float32"), name)
        )


def widen(model: ModelProto) -> None:
    """Make every bfloat16 tensor, constant and cast of a model float32, in place; no value is rounded to less."""
    _widen_graph(model.graph)


def _widen_graph(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_attributes(node)
        for body in _bodies(node):
            _widen_graph(body)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
