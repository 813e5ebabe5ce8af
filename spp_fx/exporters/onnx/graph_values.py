"""The values of an ONNX file and the nodes that compute them, with subgraphs entered and local functions inlined."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import islice
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
from spp_fx.exporters.onnx.onnx_file import OnnxFile, StoredTensor, all_nodes
from spp_fx.exporters.onnx.operators import LOOKUPS, MOVED, QUANTIZE

MAX_NODES = 200_000
"""Nodes that local functions may expand a graph to: functions that call functions grow without bound."""
_MAX_CALLS = 64
_MAX_SOURCES = 1 << 12
"""Values that are followed back to their sources."""
_STANDARD = ("", "ai.onnx")


@dataclass(eq=False)
class Value:
    """One value: a `Stored` tensor, a result of a node, or an input of the graph.

    Attributes:
        maker: the node that computes it.
        rank: of an input of the graph, if the file states it.
        alias_of: while the graph is read, the value that this one stands for: an output of a local function.
    """

    name: str
    maker: "Node | None" = None
    rank: int | None = None
    alias_of: "Value | None" = None


@dataclass(eq=False)
class Stored(Value):
    """A tensor that the file holds; `name` is its own, or one with its scope in front if that is taken."""

    holds: StoredTensor = field(kw_only=True)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """As the file states it, unchecked."""
        return tuple(self.holds.dims)

    @property
    def numel(self) -> int:
        return max(0, math.prod(self.shape))

    @property
    def data(self) -> TensorProto:
        """The tensor of its numbers, or of the non-zero ones."""
        return self.holds if isinstance(self.holds, TensorProto) else self.holds.values

    @property
    def data_type(self) -> int:
        """ONNX's number of its type."""
        return self.data.data_type


@dataclass(eq=False)
class Node:
    """A node; one of a local function is there once for each call.

    Attributes:
        op: its operator, with the domain in front if that is neither ONNX's own nor one of `QUANTIZE`.
        opset: version of the operator's domain, None if the file imports none.
        branches: outputs of each graph inside an If.
        has_bodies: whether it contains graphs.
        position: in an order in which each node comes after those that it reads.
    """

    proto: NodeProto
    op: str
    opset: int | None
    attributes: Mapping[str, Any]
    inputs: list[Value | None] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    branches: list[list[Value]] = field(default_factory=list)
    has_bodies: bool = False
    position: int = 0

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
        if self.op == "Where":
            return self.inputs[1:3]
        if self.op in ("ScatterElements", "ScatterND"):
            return [*self.inputs[:1], *self.inputs[2:3]]
        return self.inputs[:1] if self.op in MOVED or self.op in LOOKUPS else self.inputs

    def reads(self, *, data_only: bool = False) -> list[Value]:
        """The inputs, or the data inputs, and the outputs of the branches."""
        inputs = self.data_inputs() if data_only else self.inputs
        return [*filter(None, inputs), *(each for branch in self.branches for each in branch)]

    def branch_values(self, output: Value) -> list[Value]:
        """What the branches of an If return for one of its outputs."""
        at = self.outputs.index(output)
        return [branch[at] for branch in self.branches if at < len(branch)]

    def ints(self, name: str) -> list[int] | None:
        """An attribute that is a list of integers; None if it is absent or something else."""
        value = self.attributes.get(name)
        if isinstance(value, Sequence) and all(isinstance(each, int) for each in value):
            return [int(each) for each in value]
        return None

    def number(self, name: str, default: int) -> int:
        """An attribute that is an integer; the default if it is absent or something else."""
        value = self.attributes.get(name)
        return value if isinstance(value, int) else default


def reachable(
    starts: Iterable[Value | None],
    further: Callable[[Value], Iterable[Value | None]],
    seen: set[Value] | None = None,
) -> Iterator[Value]:
    """The values that `further` leads to from others, these included; each once, and none that was `seen`."""
    seen = set() if seen is None else seen
    stack = [*starts]
    while stack:
        value = stack.pop()
        if value is not None and value not in seen:
            seen.add(value)
            yield value
            stack += further(value)


def sources_of(wanted: Value, *, data_only: bool = False) -> list[Stored]:
    """The stored tensors that a value is computed from; with `data_only` not those that are scales or shapes."""
    values = reachable([wanted], lambda value: value.maker.reads(data_only=data_only) if value.maker else ())
    return [value for value in islice(values, _MAX_SOURCES) if isinstance(value, Stored)]


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


class GraphValues:
    """Every node and stored tensor of a file.

    Attributes:
        nodes: of the graph, its subgraphs and the local functions that it calls, in no particular order.
        stored: tensors by name.
        readers: the nodes that read a value.

    Raises:
        FormatError: a name is made twice; an attribute has no value; nodes or local functions form a circle;
            local functions expand the graph beyond bounds.
    """

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.nodes: list[Node] = []
        self.stored: dict[str, Stored] = {}
        self.readers: dict[Value, list[Node]] = {}
        self._by_scope: dict[tuple[str, str], Stored] = {}
        self._queue: list[tuple[GraphProto | FunctionProto, _Scope]] = []
        self._links: list[Callable[[], None]] = []  # run when all values are known
        self._functions = {_function_key(each): each for each in file.proto.functions}
        graph = file.proto.graph
        if self._expanded(graph, (), {}) > max(MAX_NODES, sum(1 for _ in all_nodes(graph))):
            raise FormatError(f"{file.path}: its local functions grow to more than {MAX_NODES} nodes")
        self._scope = _Scope("", {each.domain: each.version for each in file.proto.opset_import})
        for given in graph.input:
            shaped = given.type.tensor_type.HasField("shape")
            rank = len(given.type.tensor_type.shape.dim) if shaped else None
            self._scope.values[given.name] = Value(given.name, rank=rank)
        self._queue.append((graph, self._scope))
        for body, scope in self._queue:  # grows by the graphs and functions of the nodes
            self._enter(body, scope)
        for link in self._links:
            link()
        for node in self.nodes:
            node.inputs = [each and _resolved(each) for each in node.inputs]
            node.branches = [[_resolved(each) for each in branch] for branch in node.branches]
            for value in dict.fromkeys(node.reads()):
                self.readers.setdefault(value, []).append(node)
        self._sort()

    def find(self, name: str) -> Value:
        """A value of the main graph by its name."""
        return _resolved(self._scope.values.get(name) or Value(name))

    def _sort(self) -> None:
        makers = {node: [each.maker for each in node.reads() if each.maker] for node in self.nodes}
        try:
            for position, node in enumerate(TopologicalSorter(makers).static_order()):
                node.position = position
        except CycleError as error:
            raise FormatError(f"{self.file.path}: {error.args[1][0].label} reads its own result") from None

    def _expanded(
        self, body: GraphProto | FunctionProto, calls: tuple[str, ...], known: dict[str, int]
    ) -> int:
        """How many nodes a body has when the local functions that it calls are inlined."""
        count = 0
        for node in all_nodes(body):
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

    def _enter(self, body: GraphProto | FunctionProto, scope: _Scope) -> None:
        taken: set[str] = set()
        if isinstance(body, GraphProto):
            for tensor in body.initializer:
                self._put(scope, tensor.name, self._store(scope, tensor.name, tensor), taken)
            for sparse in body.sparse_initializer:
                name = sparse.values.name
                self._put(scope, name, self._store(scope, name, sparse), taken)
        nodes = [self._node(scope, proto, taken) for proto in body.node]
        for node in nodes:
            node.inputs = [scope.find(name) for name in node.proto.input]
            function = self._functions.get(_function_key(node.proto))
            if function is not None:
                self._inline(node, function, scope)
            else:
                self.nodes.append(node)
                self._enter_bodies(node, scope)

    def _put(self, scope: _Scope, name: str, value: Value, taken: set[str]) -> None:
        where = scope.prefix or "the graph"
        if not name:
            raise FormatError(f"{self.file.path}: an initializer in {where} has no name")
        if name in taken:
            raise FormatError(f"{name} ({self.file.path}): is made twice in {where}")
        taken.add(name)
        scope.values[name] = value

    def _store(self, scope: _Scope, name: str, holds: StoredTensor) -> Stored:
        """A stored tensor; that of a function is the same one however often it is called."""
        key = (scope.prefix, name)
        if key not in self._by_scope:
            free = name if name not in self.stored else f"{scope.prefix}{name}"
            while free in self.stored:
                free += "'"
            self._by_scope[key] = self.stored[free] = Stored(free, holds=holds)
        return self._by_scope[key]

    def _node(self, scope: _Scope, proto: NodeProto, taken: set[str]) -> Node:
        if proto.domain in _STANDARD:
            op, opset = proto.op_type, scope.opsets.get("") or scope.opsets.get("ai.onnx")
        else:
            quantize = proto.domain == "com.microsoft" and proto.op_type in QUANTIZE
            op = proto.op_type if quantize else f"{proto.domain}.{proto.op_type}"
            opset = scope.opsets.get(proto.domain)
        proto = _with_attributes(proto, scope.attributes)
        try:
            attributes = {each.name: helper.get_attribute_value(each) for each in proto.attribute}
        except ValueError as error:
            raise FormatError(f"{proto.op_type} {proto.name} ({self.file.path}): {error}") from error
        node = Node(proto, op, opset, attributes)
        held = _constant(attributes) if op == "Constant" else None
        for name in proto.output:
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
        arguments = zip(function.input, node.inputs, strict=False)
        inner.values |= {name: value for name, value in arguments if value is not None}
        self._queue.append((function, inner))

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
                inputs, outputs = ([each.name for each in values] for values in (graph.input, graph.output))
                if node.op == "If":
                    self._link_branch(node, outputs, inner)
                elif node.op == "Loop":
                    for name in inputs[:2]:  # the iteration number and the condition
                        inner.values[name].rank = 0
                    self._link_states(node.inputs[2:], inputs[2:], outputs[1:], inner)
                elif node.op == "Scan":
                    self._enter_scan(node, inputs, outputs, inner)

    def _link_branch(self, node: Node, outputs: Sequence[str], inner: _Scope) -> None:
        branch: list[Value] = []
        node.branches.append(branch)
        self._links.append(lambda: branch.extend(inner.find(name) or Value("") for name in outputs))

    def _enter_scan(self, node: Node, inputs: Sequence[str], outputs: Sequence[str], inner: _Scope) -> None:
        scanned = node.number("num_scan_inputs", 0)
        states = len(node.inputs) - scanned
        if not 0 <= states <= len(node.inputs):
            return
        self._link_states(node.inputs[:states], inputs[:states], outputs[:states], inner)
        axes = node.ints("scan_input_axes") or [0] * scanned
        for name, value, axis in zip(inputs[states:], node.inputs[states:], axes, strict=False):
            proto = helper.make_node("Gather", ["", ""], [name])
            slice_of = Node(proto, "Gather", node.opset, {"axis": axis}, [value, Value("", rank=0)])
            inner.values[name] = Value(name, maker=slice_of)
            slice_of.outputs.append(inner.values[name])
            self.nodes.append(slice_of)

    def _link_states(
        self, given: Sequence[Value | None], inputs: Sequence[str], outputs: Sequence[str], inner: _Scope
    ) -> None:
        """A state of a loop that its body passes on unchanged is the value that the loop was given."""

        def link() -> None:
            for state, outer, result in zip(inputs, given, outputs, strict=False):
                value, end = inner.values[state], inner.find(result)
                for _ in range(_MAX_CALLS):
                    if end is None or end.maker is None or end.maker.op != "Identity" or not end.maker.inputs:
                        break
                    end = end.maker.inputs[0]
                if outer is not None and end is value and value.maker is None:
                    value.alias_of = outer

        self._links.append(link)


def _resolved(value: Value) -> Value:
    """The value itself, behind its aliases."""
    for _ in range(2 * _MAX_CALLS):  # a damaged function may return its own input, in a circle
        if value.alias_of is None:
            return value
        value = value.alias_of
    return Value(value.name)


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


def _constant(attributes: Mapping[str, Any]) -> StoredTensor | None:
    """What a Constant node holds; None if that is text, or nothing."""
    for name in ("value", "sparse_value"):
        if isinstance(held := attributes.get(name), TensorProto | SparseTensorProto):
            return held
    for kind, dtype in (("float", np.float32), ("int", np.int64)):
        for name in (f"value_{kind}", f"value_{kind}s"):
            numbers = np.asarray(attributes.get(name))
            if numbers.dtype.kind in "if":
                return numpy_helper.from_array(numbers.astype(dtype))
    return None
