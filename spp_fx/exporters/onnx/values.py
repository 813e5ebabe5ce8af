"""The values of an ONNX file and what makes them: subgraphs entered, local functions followed into their bodies."""

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
from spp_fx.exporters.onnx.reader import OnnxFile
from spp_fx.exporters.onnx.unpack import Unpacked

MAX_NODES = 200_000
"""Nodes that local functions may grow a graph to: functions that call functions grow without bound."""
_MAX_CALLS = 64
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that the file holds, or that it unpacks of such.

    Attributes:
        name: its own name, or one with its place before it where another tensor has that name.
        holds: the protobuf; None where it is unpacked.
        shape: as the file says it, unchecked.
        data_type: ONNX's number of its type.
    """

    name: str
    holds: TensorProto | SparseTensorProto | None
    shape: tuple[int, ...]
    data_type: int


@dataclass(eq=False)
class Value:
    """One value: stored, made by a node, another value under a new name, or given when the graph is run.

    Attributes:
        rank: of an input of the graph, where the file says it.
        same: the value that this one is, for inputs and outputs of local functions.
    """

    name: str
    stored: Stored | None = None
    maker: "Made | None" = None
    same: "Value | None" = None
    rank: int | None = None


@dataclass(eq=False)
class Made:
    """A node, as often as it is there when local functions are put in.

    Attributes:
        op: its operator; with the domain before it where that is not ONNX's own.
        opset: version of the operator's domain, None where the file imports none.
        branches: outputs of each graph inside an If.
        bodies: whether it holds graphs.
        called: whether it calls a local function, whose nodes are there in its place.
    """

    path: Path
    node: NodeProto
    op: str
    opset: int | None
    inputs: list[Value | None]
    outputs: list[Value]
    branches: list[list[Value]] = field(default_factory=list)
    bodies: bool = False
    called: bool = False

    @property
    def label(self) -> str:
        """The node as a message names it."""
        own = self.node.name or (self.outputs[0].name if self.outputs else "")
        return f"{self.op} {own[:200]}".strip()

    @property
    def standard(self) -> bool:
        return "." not in self.op

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute.

        Raises:
            FormatError: it has none.
        """
        for each in self.node.attribute:
            if each.name == name:
                try:
                    return helper.get_attribute_value(each)
                except ValueError as error:
                    raise FormatError(
                        f"{self.label} ({self.path}): its attribute {name} has no value"
                    ) from error
        return default

    def ints(self, name: str) -> list[int] | None:
        """An attribute that is a list of integers; None where it is absent or something else."""
        value = self.attribute(name)
        if isinstance(value, Sequence) and all(isinstance(each, int) for each in value):
            return [int(each) for each in value]
        return None

    def number(self, name: str, default: int) -> int:
        """An attribute that is an integer; the default where it is absent or something else."""
        value = self.attribute(name)
        return value if isinstance(value, int) else default


def same(value: Value) -> Value:
    """The value itself, behind the names that local functions give it."""
    for _ in range(2 * _MAX_CALLS):  # a damaged function may return what it is given, in a circle
        if value.same is None:
            return value
        value = value.same
    return Value(value.name)


@dataclass
class _Scope:
    """The names that a graph or a function body sees."""

    place: str
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


_Body = GraphProto | FunctionProto


@dataclass
class Values:
    """Every node and stored tensor of a file.

    Raises:
        FormatError: a name is made twice; local functions call themselves, or grow the graph beyond bounds.
    """

    file: OnnxFile
    unpacked: Mapping[str, Unpacked]
    nodes: list[Made] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    _seen: dict[tuple[str, str], Stored] = field(default_factory=dict)
    _queue: list[tuple[_Body, _Scope]] = field(default_factory=list)
    _later: list[Callable[[], None]] = field(default_factory=list)
    _functions: dict[str, FunctionProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        proto = self.file.proto
        self._functions = {_key(each): each for each in proto.functions}
        grown = self._grown(proto.graph, (), {})
        if grown > max(MAX_NODES, sum(1 for _ in _nodes_in(proto.graph))):
            raise FormatError(f"{self.file.path}: its local functions grow to more than {MAX_NODES} nodes")
        scope = _Scope("", {each.domain: each.version for each in proto.opset_import})
        for given in proto.graph.input:
            shaped = given.type.tensor_type.HasField("shape")
            rank = len(given.type.tensor_type.shape.dim) if shaped else None
            scope.values[given.name] = Value(given.name, rank=rank)
        self._queue.append((proto.graph, scope))
        for body, inner in self._queue:  # grows by what the nodes hold
            self._enter(body, inner)
        for name, chain in self.unpacked.items():
            stored = Stored(name, None, self._unpacked_shape(chain), self.file.dense[chain.values].data_type)
            self.stored[name] = scope.values[name].stored = stored
        for link in self._later:
            link()
        self.nodes = [made for made in self.nodes if not made.called]

    def _grown(self, body: _Body, calls: tuple[str, ...], known: dict[str, int]) -> int:
        """How many nodes a body has when the local functions that it calls are put in."""
        count = 0
        for node in _nodes_in(body):
            key = _key(node)
            count += 1
            if (function := self._functions.get(key)) is None:
                continue
            if key in calls or len(calls) >= _MAX_CALLS:
                raise FormatError(f"{self.file.path}: the local function {function.name[:200]} calls itself")
            if key not in known:
                known[key] = self._grown(function, (*calls, key), known)
            count += known[key]
        return count

    def _unpacked_shape(self, chain: Unpacked) -> tuple[int, ...]:
        if chain.shape not in self.file.dense:
            raise FormatError(f"{chain.name} ({self.file.path}): {chain.shape} is no constant")
        shape = [int(size) for size in self.file.read(chain.shape).reshape(-1)]
        if chain.perm is None or sorted(chain.perm) != list(range(len(shape))):
            return tuple(shape)  # a wrong order is told when it is unpacked
        return tuple(shape[axis] for axis in chain.perm)

    def _enter(self, body: _Body, scope: _Scope) -> None:
        taken: set[str] = set()
        if isinstance(body, GraphProto):
            for tensor in body.initializer:
                self._put(scope, tensor.name, self._store(scope, tensor.name, tensor), taken)
            for sparse in body.sparse_initializer:
                name = sparse.values.name
                self._put(scope, name, self._store(scope, name, sparse), taken)
        made = [self._make(scope, node, taken) for node in body.node]
        for each in made:
            each.inputs += [scope.find(name) for name in each.node.input]
            self._open(each, scope)

    def _put(self, scope: _Scope, name: str, value: Value, taken: set[str]) -> None:
        if not name:
            raise FormatError(f"{self.file.path}: an initializer in {scope.place or 'the graph'} has no name")
        if name in taken:
            raise FormatError(f"{name} ({self.file.path}): is made twice in {scope.place or 'the graph'}")
        taken.add(name)
        scope.values[name] = value

    def _store(self, scope: _Scope, name: str, holds: TensorProto | SparseTensorProto) -> Value:
        """A stored tensor; that of a function is the same one however often it is called."""
        key = (scope.place, name)
        if key not in self._seen:
            free = name if name not in self.stored else f"{scope.place}{name}"
            while free in self.stored:
                free += "'"
            typed = holds.values if isinstance(holds, SparseTensorProto) else holds
            self._seen[key] = self.stored[free] = Stored(free, holds, tuple(holds.dims), typed.data_type)
        stored = self._seen[key]
        return Value(stored.name, stored=stored)

    def _make(self, scope: _Scope, node: NodeProto, taken: set[str]) -> Made:
        node = _with_attributes(node, scope.attributes)
        op = node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"
        version = scope.opsets.get("") or scope.opsets.get("ai.onnx")
        version = version if node.domain in _STANDARD else scope.opsets.get(node.domain)
        made = Made(self.file.path, node, op, version, [], [])
        self.nodes.append(made)
        for name in node.output:
            held = _constant(made) if op == "Constant" else None
            value = Value(name, maker=made) if held is None else self._store(scope, name, held)
            made.outputs.append(value)
            if name:
                self._put(scope, name, value, taken)
        return made

    def _open(self, made: Made, scope: _Scope) -> None:
        """Enter the function that a node calls and the graphs that it holds."""
        function = self._functions.get(_key(made.node))
        if function is not None:
            self._call(made, function, scope)
            return
        for attribute in made.node.attribute:
            graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for index, graph in enumerate(graphs):
                made.bodies = True
                label = made.node.name or (made.node.output[0] if made.node.output else made.op)
                place = f"{scope.place}{label}.{attribute.name}{index or ''}/"
                inner = _Scope(place, scope.opsets, scope, scope.attributes)
                self._bind(made, graph, inner)
                self._queue.append((graph, inner))

    def _call(self, made: Made, function: FunctionProto, scope: _Scope) -> None:
        given = {each.name: each for each in function.attribute_proto}
        given |= {each.name: each for each in made.node.attribute}
        place = f"{function.name}/"
        if function.attribute or function.attribute_proto:  # its constants may be other ones at each call
            place = f"{scope.place}{made.node.output[0] if made.node.output else ''}.{place}"
        opsets = {each.domain: each.version for each in function.opset_import}
        inner = _Scope(place, opsets, None, given)
        for name, value in zip(function.input, made.inputs, strict=False):
            if value is not None:
                inner.values[name] = Value(value.name, same=value)
        self._queue.append((function, inner))
        made.called = True

        def link() -> None:
            for name, value in zip(function.output, made.outputs, strict=False):
                value.maker, value.same = None, inner.find(name)

        self._later.append(link)

    def _bind(self, made: Made, graph: GraphProto, inner: _Scope) -> None:
        """Give a graph inside a node the inputs that the node hands it, as far as they are weights there."""
        for given in graph.input:
            inner.values[given.name] = Value(given.name)
        if made.op == "If":
            branch: list[Value] = []
            made.branches.append(branch)
            self._later.append(lambda: branch.extend(_found(inner, graph)))
        elif made.op == "Loop":
            for given in list(graph.input)[:2]:  # the number of the round, and whether there is another
                inner.values[given.name].rank = 0
            self._pass_on(made.inputs[2:], graph, 2, 1, inner)
        elif made.op == "Scan":
            scanned = made.number("num_scan_inputs", 0)
            states = len(made.inputs) - scanned
            if not 0 <= states <= len(made.inputs):
                return
            self._pass_on(made.inputs[:states], graph, 0, 0, inner)
            axes = made.ints("scan_input_axes") or [0] * scanned
            for given, value, axis in zip(
                list(graph.input)[states:], made.inputs[states:], axes, strict=False
            ):
                node = helper.make_node("Gather", ["", ""], [given.name], axis=axis)
                slice_of = Made(self.file.path, node, "Gather", made.opset, [value, Value("", rank=0)], [])
                inner.values[given.name] = Value(given.name, maker=slice_of)
                slice_of.outputs.append(inner.values[given.name])
                self.nodes.append(slice_of)

    def _pass_on(
        self, given: Sequence[Value | None], graph: GraphProto, skipped: int, results: int, inner: _Scope
    ) -> None:
        """States of a loop: what its body hands on as it is, is what the loop was given."""

        def link() -> None:
            names = [each.name for each in graph.input][skipped:]
            for name, outer, result in zip(names, given, list(graph.output)[results:], strict=False):
                state, end = inner.values.get(name), inner.find(result.name)
                for _ in range(_MAX_CALLS):
                    if end is None or end.maker is None or end.maker.op != "Identity" or not end.maker.inputs:
                        break
                    end = end.maker.inputs[0]
                if state is not None and outer is not None and end is state and state.maker is None:
                    state.same = outer

        self._later.append(link)


def _nodes_in(body: _Body) -> Iterator[NodeProto]:
    """The nodes of a body and of the graphs inside them."""
    bodies = [body]
    for each in bodies:  # grows by the graphs inside its nodes
        for node in each.node:
            yield node
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _found(scope: _Scope, graph: GraphProto) -> Iterator[Value]:
    for output in graph.output:
        yield scope.find(output.name) or Value(output.name)


def _key(of: FunctionProto | NodeProto) -> str:
    name = of.name if isinstance(of, FunctionProto) else of.op_type
    return f"{'' if of.domain == 'ai.onnx' else of.domain}\0{name}\0{of.overload}"


def _with_attributes(node: NodeProto, given: Mapping[str, AttributeProto] | None) -> NodeProto:
    """A function's node with the attributes of the call in place of references to them."""
    if not given and not any(each.ref_attr_name for each in node.attribute):
        return node
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


def _constant(made: Made) -> TensorProto | SparseTensorProto | None:
    """What a Constant node holds; None where that is text, or nothing."""
    for each in made.node.attribute:
        if each.name == "value" and each.HasField("t"):
            return each.t
        if each.name == "sparse_value" and each.HasField("sparse_tensor"):
            return each.sparse_tensor
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        value = made.attribute(name)
        numbers = value if isinstance(value, Sequence) else [value]
        if value is not None and all(isinstance(each, int | float) for each in numbers):
            return numpy_helper.from_array(np.array(value, dtype=dtype))
    return None
