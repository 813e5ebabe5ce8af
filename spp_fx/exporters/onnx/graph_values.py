"""The values of an ONNX file and the nodes that compute them, with subgraphs entered and local functions inlined."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from spp_fx.errors import FormatError
from spp_fx.exporters.onnx.onnx_file import OnnxFile, PackedWeight

MAX_NODES = 200_000
"""Nodes that local functions may expand a graph to: functions that call functions grow without bound."""
_MAX_CALLS = 64
_MAX_SOURCES = 1 << 12
"""Values that are followed back to their sources."""
_STANDARD = ("", "ai.onnx")
QUANTIZE = ("DequantizeLinear", "QuantizeLinear")
"""Operators that onnxruntime also has in its own domain, for types that ONNX took later."""
_DATA_FIRST = frozenset({
    "Cast", "CastLike", "Clip", "CumSum", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "Pad", "QuantizeLinear", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceSum", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that the file holds, or a packed weight.

    Attributes:
        name: its own name, or one with its scope in front if another tensor has that name.
        holds: where its numbers are.
        shape: as the file states it, unchecked.
        data_type: ONNX's number of its type.
    """

    name: str
    holds: TensorProto | SparseTensorProto | PackedWeight
    shape: tuple[int, ...]
    data_type: int


@dataclass(eq=False)
class Value:
    """One value: stored, computed by a node, an alias of another value, or an input of the graph.

    Attributes:
        rank: of an input of the graph, if the file states it.
        alias_of: the value that this one is, for inputs and outputs of local functions.
    """

    name: str
    stored: Stored | None = None
    maker: "Node | None" = None
    alias_of: "Value | None" = None
    rank: int | None = None


@dataclass(eq=False)
class Node:
    """A node; a node of a local function is there once per call.

    Attributes:
        path: of the file, for messages.
        op: its operator, with the domain in front if that is neither ONNX's own nor one of `QUANTIZE`.
        opset: version of the operator's domain, None if the file imports none.
        branches: outputs of each graph inside an If.
        has_bodies: whether it contains graphs.
        inlined: whether it calls a local function, whose nodes stand in its place.
    """

    path: Path
    proto: NodeProto
    op: str
    opset: int | None
    inputs: list[Value | None]
    outputs: list[Value]
    branches: list[list[Value]] = field(default_factory=list)
    has_bodies: bool = False
    inlined: bool = False

    @property
    def label(self) -> str:
        """The node as a message names it."""
        own = self.proto.name or (self.outputs[0].name if self.outputs else "")
        domain = "" if self.proto.domain in _STANDARD else f"{self.proto.domain}."
        return f"{domain}{self.proto.op_type} {own[:200]}".strip()

    @property
    def standard(self) -> bool:
        """Whether the operator is one of ONNX's own, or has one's meaning."""
        return "." not in self.op

    def input(self, at: int | None) -> Value | None:
        """An input by its index; None if the node does not have it."""
        return self.inputs[at] if at is not None and at < len(self.inputs) else None

    def data_inputs(self) -> list[Value | None]:
        """The inputs whose numbers are in the result: no indices, shapes, scales or conditions."""
        if self.op in _DATA_FIRST:
            return self.inputs[:1]
        if self.op == "Where":
            return self.inputs[1:3]
        if self.op in ("ScatterElements", "ScatterND"):
            return [*self.inputs[:1], *self.inputs[2:3]]
        return self.inputs

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute.

        Raises:
            FormatError: it has none.
        """
        for each in self.proto.attribute:
            if each.name == name:
                try:
                    return helper.get_attribute_value(each)
                except ValueError as error:
                    raise FormatError(
                        f"{self.label} ({self.path}): its attribute {name} has no value"
                    ) from error
        return default

    def ints(self, name: str) -> list[int] | None:
        """An attribute that is a list of integers; None if it is absent or something else."""
        value = self.attribute(name)
        if isinstance(value, Sequence) and all(isinstance(each, int) for each in value):
            return [int(each) for each in value]
        return None

    def number(self, name: str, default: int) -> int:
        """An attribute that is an integer; the default if it is absent or something else."""
        value = self.attribute(name)
        return value if isinstance(value, int) else default


def resolved(value: Value) -> Value:
    """The value itself, behind its aliases in local functions."""
    for _ in range(2 * _MAX_CALLS):  # a damaged function may return its own input, in a circle
        if value.alias_of is None:
            return value
        value = value.alias_of
    return Value(value.name)


def sources_of(wanted: Value, *, data_only: bool = False) -> Iterator[Stored]:
    """The stored tensors that a value is computed from; with `data_only` not those that are scales or shapes."""
    seen: set[int] = set()
    stack = [resolved(wanted)]
    while stack and len(seen) < _MAX_SOURCES:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.stored is not None:
            yield value.stored
        elif (node := value.maker) is not None:
            inputs = node.data_inputs() if data_only else node.inputs
            stack += [resolved(each) for each in inputs if each]
            stack += [resolved(each) for branch in node.branches for each in branch]


@dataclass
class _Scope:
    """The names that a graph or a function body sees.

    Attributes:
        prefix: its name, in front of the names of its tensors.
        attributes: what a call passes to a function.
    """

    prefix: str
    opsets: Mapping[str, int]
    parent: "_Scope | None" = None
    attributes: Mapping[str, AttributeProto] | None = None
    values: dict[str, Value] = field(default_factory=dict)

    def find(self, name: str) -> Value | None:
        if not name:
            return None
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return Value(name)

    def outputs(self, graph: GraphProto) -> list[Value]:
        return [self.find(output.name) or Value(output.name) for output in graph.output]


_Body = GraphProto | FunctionProto


class GraphValues:
    """Every node and stored tensor of a file.

    Attributes:
        nodes: of the graph, its subgraphs and the local functions that it calls, in no particular order.
        stored: tensors by name.

    Raises:
        FormatError: a name is made twice; local functions call themselves, or expand the graph beyond bounds.
    """

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.nodes: list[Node] = []
        self.stored: dict[str, Stored] = {}
        self._by_scope: dict[tuple[str, str], Stored] = {}
        self._queue: list[tuple[_Body, _Scope]] = []
        self._links: list[Callable[[], None]] = []  # run when all values are known
        self._functions = {_function_key(each): each for each in file.proto.functions}
        graph = file.proto.graph
        if self._expanded(graph, (), {}) > max(MAX_NODES, sum(1 for _ in _nodes_in(graph))):
            raise FormatError(f"{file.path}: its local functions grow to more than {MAX_NODES} nodes")
        scope = _Scope("", {each.domain: each.version for each in file.proto.opset_import})
        for given in graph.input:
            shaped = given.type.tensor_type.HasField("shape")
            rank = len(given.type.tensor_type.shape.dim) if shaped else None
            scope.values[given.name] = Value(given.name, rank=rank)
        self._queue.append((graph, scope))
        for body, inner in self._queue:  # grows by the graphs and functions of the nodes
            self._enter(body, inner)
        for name, packed in file.packed.items():
            stored = Stored(name, packed, self._packed_shape(packed), file.dense[packed.values].data_type)
            self.stored[name] = scope.values[name].stored = stored
        for link in self._links:
            link()
        self.nodes = [node for node in self.nodes if not node.inlined]

    def _expanded(self, body: _Body, calls: tuple[str, ...], known: dict[str, int]) -> int:
        """How many nodes a body has when the local functions that it calls are inlined."""
        count = 0
        for node in _nodes_in(body):
            key = _function_key(node)
            count += 1
            if (function := self._functions.get(key)) is None:
                continue
            if key in calls or len(calls) >= _MAX_CALLS:
                raise FormatError(f"{self.file.path}: the local function {function.name[:200]} calls itself")
            if key not in known:
                known[key] = self._expanded(function, (*calls, key), known)
            count += known[key]
        return count

    def _packed_shape(self, packed: PackedWeight) -> tuple[int, ...]:
        if packed.shape not in self.file.dense:
            raise FormatError(f"{packed.name} ({self.file.path}): {packed.shape} is no constant")
        shape = [int(size) for size in self.file.read(packed.shape).reshape(-1)]
        if packed.perm is None or sorted(packed.perm) != list(range(len(shape))):
            return tuple(shape)  # a wrong order is an error when it is unpacked
        return tuple(shape[axis] for axis in packed.perm)

    def _enter(self, body: _Body, scope: _Scope) -> None:
        taken: set[str] = set()
        if isinstance(body, GraphProto):
            for tensor in body.initializer:
                self._put(scope, tensor.name, self._store(scope, tensor.name, tensor), taken)
            for sparse in body.sparse_initializer:
                name = sparse.values.name
                self._put(scope, name, self._store(scope, name, sparse), taken)
        nodes = [self._node(scope, proto, taken) for proto in body.node]
        for node in nodes:
            node.inputs += [scope.find(name) for name in node.proto.input]
            function = self._functions.get(_function_key(node.proto))
            if function is not None:
                self._inline(node, function, scope)
            else:
                self._enter_bodies(node, scope)

    def _put(self, scope: _Scope, name: str, value: Value, taken: set[str]) -> None:
        if not name:
            raise FormatError(
                f"{self.file.path}: an initializer in {scope.prefix or 'the graph'} has no name"
            )
        if name in taken:
            raise FormatError(f"{name} ({self.file.path}): is made twice in {scope.prefix or 'the graph'}")
        taken.add(name)
        scope.values[name] = value

    def _store(self, scope: _Scope, name: str, holds: TensorProto | SparseTensorProto) -> Value:
        """A stored tensor; that of a function is the same one however often it is called."""
        key = (scope.prefix, name)
        if key not in self._by_scope:
            free = name if name not in self.stored else f"{scope.prefix}{name}"
            while free in self.stored:
                free += "'"
            typed = holds.values if isinstance(holds, SparseTensorProto) else holds
            stored = Stored(free, holds, tuple(holds.dims), typed.data_type)
            self._by_scope[key] = self.stored[free] = stored
        return Value(self._by_scope[key].name, stored=self._by_scope[key])

    def _node(self, scope: _Scope, proto: NodeProto, taken: set[str]) -> Node:
        proto = _with_attributes(proto, scope.attributes)
        if proto.domain in _STANDARD:
            op, opset = proto.op_type, scope.opsets.get("") or scope.opsets.get("ai.onnx")
        else:
            quantize = proto.domain == "com.microsoft" and proto.op_type in QUANTIZE
            op = proto.op_type if quantize else f"{proto.domain}.{proto.op_type}"
            opset = scope.opsets.get(proto.domain)
        node = Node(self.file.path, proto, op, opset, [], [])
        self.nodes.append(node)
        for name in proto.output:
            held = _constant(node) if op == "Constant" else None
            value = Value(name, maker=node) if held is None else self._store(scope, name, held)
            node.outputs.append(value)
            if name:
                self._put(scope, name, value, taken)
        return node

    def _inline(self, node: Node, function: FunctionProto, scope: _Scope) -> None:
        given = {each.name: each for each in (*function.attribute_proto, *node.proto.attribute)}
        prefix = f"{function.name}/"
        if function.attribute or function.attribute_proto:  # its constants may differ from call to call
            prefix = f"{scope.prefix}{node.proto.output[0] if node.proto.output else ''}.{prefix}"
        opsets = {each.domain: each.version for each in function.opset_import}
        inner = _Scope(prefix, opsets, None, given)
        for name, value in zip(function.input, node.inputs, strict=False):
            if value is not None:
                inner.values[name] = Value(value.name, alias_of=value)
        self._queue.append((function, inner))
        node.inlined = True

        def link() -> None:
            for name, value in zip(function.output, node.outputs, strict=False):
                value.maker, value.alias_of = None, inner.find(name)

        self._links.append(link)

    def _enter_bodies(self, node: Node, scope: _Scope) -> None:
        """Queue the graphs inside a node, with the inputs that the node gives them if those may be weights."""
        label = node.proto.name or (node.proto.output[0] if node.proto.output else node.op)
        for attribute in node.proto.attribute:
            graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for index, graph in enumerate(graphs):
                node.has_bodies = True
                prefix = f"{scope.prefix}{label}.{attribute.name}{index or ''}/"
                inner = _Scope(prefix, scope.opsets, scope, scope.attributes)
                inner.values |= {given.name: Value(given.name) for given in graph.input}
                self._queue.append((graph, inner))
                if node.op == "If":
                    self._link_branch(node, graph, inner)
                elif node.op == "Loop":
                    for given in list(graph.input)[:2]:  # the iteration number and the condition
                        inner.values[given.name].rank = 0
                    self._link_states(node.inputs[2:], list(graph.input)[2:], list(graph.output)[1:], inner)
                elif node.op == "Scan":
                    self._enter_scan(node, graph, inner)

    def _link_branch(self, node: Node, graph: GraphProto, inner: _Scope) -> None:
        branch: list[Value] = []
        node.branches.append(branch)
        self._links.append(lambda: branch.extend(inner.outputs(graph)))

    def _enter_scan(self, node: Node, graph: GraphProto, inner: _Scope) -> None:
        scanned = node.number("num_scan_inputs", 0)
        states = len(node.inputs) - scanned
        if not 0 <= states <= len(node.inputs):
            return
        self._link_states(node.inputs[:states], graph.input, graph.output, inner)
        axes = node.ints("scan_input_axes") or [0] * scanned
        for given, value, axis in zip(list(graph.input)[states:], node.inputs[states:], axes, strict=False):
            proto = helper.make_node("Gather", ["", ""], [given.name], axis=axis)
            slice_of = Node(self.file.path, proto, "Gather", node.opset, [value, Value("", rank=0)], [])
            inner.values[given.name] = Value(given.name, maker=slice_of)
            slice_of.outputs.append(inner.values[given.name])
            self.nodes.append(slice_of)

    def _link_states(
        self, given: Sequence[Value | None], inputs: Sequence[Any], outputs: Sequence[Any], inner: _Scope
    ) -> None:
        """A state of a loop that its body passes on unchanged is the value that the loop was given."""

        def link() -> None:
            for state, outer, result in zip(inputs, given, outputs, strict=False):
                value, end = inner.values.get(state.name), inner.find(result.name)
                for _ in range(_MAX_CALLS):
                    if end is None or end.maker is None or end.maker.op != "Identity" or not end.maker.inputs:
                        break
                    end = end.maker.inputs[0]
                if value is not None and outer is not None and end is value and value.maker is None:
                    value.alias_of = outer

        self._links.append(link)


def _nodes_in(body: _Body) -> Iterator[NodeProto]:
    """The nodes of a body and of the graphs inside them."""
    bodies = [body]
    for each in bodies:  # grows by the graphs inside its nodes
        for node in each.node:
            yield node
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _function_key(of: FunctionProto | NodeProto) -> str:
    name = of.name if isinstance(of, FunctionProto) else of.op_type
    return f"{'' if of.domain == 'ai.onnx' else of.domain}\0{name}\0{of.overload}"


def _with_attributes(node: NodeProto, given: Mapping[str, AttributeProto] | None) -> NodeProto:
    """A function's node with the attributes of the call in place of references to them."""
    if not any(each.ref_attr_name for each in node.attribute):
        return node
    own = NodeProto()
    own.CopyFrom(node)
    del own.attribute[:]
    for each in node.attribute:
        if not each.ref_attr_name:
            own.attribute.add().CopyFrom(each)
        elif given and each.ref_attr_name in given:
            put = own.attribute.add()
            put.CopyFrom(given[each.ref_attr_name])
            put.name = each.name
    return own


def _constant(node: Node) -> TensorProto | SparseTensorProto | None:
    """What a Constant node holds; None if that is text, or nothing."""
    for each in node.proto.attribute:
        if each.name == "value" and each.HasField("t"):
            return each.t
        if each.name == "sparse_value" and each.HasField("sparse_tensor"):
            return each.sparse_tensor
    for kind, dtype in (("float", np.float32), ("int", np.int64)):
        for name in (f"value_{kind}", f"value_{kind}s"):
            value = node.attribute(name)
            numbers = value if isinstance(value, Sequence) else [value]
            if value is not None and all(isinstance(each, int | float) for each in numbers):
                return numpy_helper.from_array(np.array(value, dtype=dtype))
    return None
