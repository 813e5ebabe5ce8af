"""What the constants of an ONNX graph become: their computed values, and in which form they reach an operand.

Values are computed node by node with onnx's reference evaluator. A file is untrusted: an operator only runs if
the size of its result is known before and is at most a small multiple of what the file stores.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from onnx import NodeProto, TensorProto, checker, defs, helper
from onnx.reference import ReferenceEvaluator

from spp_fx.exporters.onnx.graph_values import QUANTIZE, GraphValues, Node, Value, resolved, sources_of
from spp_fx.exporters.onnx.onnx_file import Array, OnnxFile

MAX_CHAIN = 256
"""Nodes between constants and the weight that they become, at most."""
_MAX_GROWTH = 64
"""Elements of one result for each that is stored, at most; `_MAX_WORK` of all results together."""
_MAX_WORK = 512
_SMALL = 1 << 16
"""Elements that are always allowed."""
_MAX_PRODUCT = 1 << 32
"""Multiplications of a product of two constants."""
_MAX_BRANCHES = 64
_MAX_DEPTH = 64

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_UNARY = frozenset({
    "Abs", "BitwiseNot", "Cast", "CastLike", "Ceil", "Clip", "DequantizeLinear", "Exp", "Flatten", "Floor",
    "Identity", "Log", "Neg", "Not", "QuantizeLinear", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
    "Shape", "Sigmoid", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Tanh", "Transpose", "Trilu",
    "Unsqueeze",
})  # fmt: skip
"""Operators whose result is no larger than their first input, but for the exceptions in `_result_size`."""
BROADCAST = frozenset({
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where",
    "Xor",
})  # fmt: skip
_SIZED = frozenset({
    "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "MatMul", "Range", "Tile",
})  # fmt: skip
_FOLDED = _UNARY | BROADCAST | _SIZED
ELEMENTWISE = BROADCAST | frozenset({
    "Abs", "BatchNormalization", "BitwiseNot", "Ceil", "Concat", "Cos", "Cosh", "CumSum", "Dropout", "Elu",
    "Erf", "Exp", "Floor", "Gelu", "GroupNormalization", "HardSigmoid", "HardSwish",
    "InstanceNormalization", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax",
    "LpNormalization", "Mean", "MeanVarianceNormalization", "Mish", "Neg", "Not", "PRelu",
    "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
})  # fmt: skip
MOVED = frozenset({
    "Cast", "CastLike", "Clip", "Compress", "CumSum", "DequantizeLinear", "Expand", "Flatten", "Identity",
    "Pad", "QuantizeLinear", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape", "Resize", "Reverse",
    "ReverseSequence", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "TopK",
    "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
_RANDOM = frozenset({
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
})  # fmt: skip
_QUANTIZE_FROM = 19
"""The evaluator has `QUANTIZE` from this version on; they compute the same per tensor and per axis."""
_EVALUATION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    checker.ValidationError,
)
"""What the evaluator raises of a node that is wrong or that it does not know: it checks nothing beforehand."""


class Unfoldable(Exception):
    """A value cannot be computed; the text says why, as the reason of a site."""


def chain_of(wanted: Value) -> list[Node]:
    """The nodes that compute a value of constants, each after those that it needs.

    Raises:
        Unfoldable: they are too many, run in a circle, or one of them is not understood.
    """
    order: list[Node] = []
    state: dict[int, bool] = {}  # node -> whether all that it needs is in `order`
    stack = [resolved(wanted)]
    while stack:
        value = stack[-1]
        node = value.maker
        if value.stored is not None or node is None or state.get(id(node)):
            stack.pop()
            continue
        if id(node) in state:
            stack.pop()
            state[id(node)] = True
            order.append(node)
            continue
        state[id(node)] = False
        if len(state) > MAX_CHAIN:
            raise Unfoldable(f"is computed by more than {MAX_CHAIN} operators")
        if node.has_bodies or node.op not in _FOLDED:
            raise Unfoldable(f"is computed by {node.label}, an operator that is not followed")
        for each in node.inputs:
            if each is not None and (before := resolved(each)).stored is None:
                if before.maker is not None and state.get(id(before.maker)) is False:
                    raise Unfoldable("is computed in a circle")
                stack.append(before)
    return order


def fold(wanted: Value, file: OnnxFile) -> Array:
    """The numbers of a value that is computed from constants.

    Raises:
        Unfoldable: an operator is not understood, makes too much, or fails.
        FormatError: a stored tensor is damaged.
    """
    target = resolved(wanted)
    if target.stored is not None:
        return file.read_stored(target.stored.name, target.stored.holds)
    order = chain_of(target)
    inputs = {id(node): [None if each is None else resolved(each) for each in node.inputs] for node in order}
    used = [value for node in order for value in inputs[id(node)] if value is not None]
    stored = {value.stored.name: value.stored for value in used if value.stored is not None}
    limit = _SMALL + sum(max(0, math.prod(each.shape)) for each in stored.values())
    uses_left = Counter(id(value) for value in used)
    arrays: dict[int, Array] = {}
    work = 0
    for node in order:
        for value in inputs[id(node)]:
            if value is not None and id(value) not in arrays:
                if value.stored is None:
                    raise Unfoldable(f"is computed by {node.label} of something that is not there")
                arrays[id(value)] = file.read_stored(value.stored.name, value.stored.holds)
        given = [None if value is None else arrays[id(value)] for value in inputs[id(node)]]
        try:
            size = _result_size(node, given)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise Unfoldable(f"is computed by {node.label}, whose inputs do not fit: {error}") from error
        work += size
        if size > _MAX_GROWTH * limit or work > _MAX_WORK * limit:
            raise Unfoldable(
                f"is computed by {node.label}, which makes {size} elements of {limit} at most stored"
            )
        for value, array in zip(node.outputs, _evaluate(node, given), strict=False):
            arrays[id(value)] = array
        for value in inputs[id(node)]:
            if value is not None:
                uses_left[id(value)] -= 1
                if not uses_left[id(value)] and value is not target:
                    arrays.pop(id(value), None)
    return arrays[id(target)]


def _result_size(node: Node, given: Sequence[Array | None]) -> int:
    """How many elements a node makes at most."""
    op = node.op
    arrays = [array for array in given if array is not None]
    shapes = [array.shape for array in arrays]
    if op in BROADCAST:
        return math.prod(np.broadcast_shapes(*shapes))
    if op == "ConstantOfShape":
        return _product_of(arrays[0])
    if op == "Expand":
        sizes = [int(size) for size in arrays[1].reshape(-1)]
        return math.prod(np.broadcast_shapes(shapes[0], tuple(sizes)))
    if op == "Tile":
        return arrays[0].size * _product_of(arrays[1])
    if op == "Range":
        start, limit, delta = (float(each.reshape(-1)[0]) for each in arrays[:3])
        return max(0, math.ceil((limit - start) / delta)) if delta else 2**62
    if op == "Gather":
        axis = node.number("axis", 0)
        return arrays[1].size * (arrays[0].size // max(1, shapes[0][axis]))
    if op == "MatMul":
        return _product_size(shapes[0], shapes[1])
    if op == "Concat":
        return sum(each.size for each in arrays)
    if op == "GatherElements":
        return arrays[1].size
    size = max(each.size for each in arrays)
    if op == "Split" and node.number("num_outputs", len(node.outputs)) != len(node.outputs):
        raise ValueError(f"{node.number('num_outputs', 0)} outputs are {len(node.outputs)}")
    if op in ("QuantizeLinear", "DequantizeLinear"):
        return _quantized_size(node, arrays)
    if op == "Cast" and node.number("to", 0) in (0, TensorProto.STRING):
        raise ValueError("text where numbers are expected")
    if op == "CastLike" and arrays[1].dtype.hasobject:
        raise ValueError("text where numbers are expected")
    if op == "Clip":
        return math.prod(np.broadcast_shapes(*shapes))
    return size


def _quantized_size(node: Node, arrays: Sequence[Array]) -> int:
    block = node.number("block_size", 0)
    axis, shape = node.number("axis", 1), arrays[0].shape
    size = arrays[0].size
    for scale in arrays[1:3]:
        if block > 0 and scale.ndim:
            size = max(size, scale.size * block)
        elif scale.size > 1 and (scale.ndim != 1 or scale.size != shape[axis]):
            raise ValueError(f"scales of {list(scale.shape)} for {list(shape)}")
    return size


def _product_of(sizes: Array) -> int:
    return math.prod(max(0, int(size)) for size in sizes.reshape(-1))


def _product_size(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    if len(left) < 1 or len(right) < 1:
        raise ValueError("a product of a single number")
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    size = math.prod(np.broadcast_shapes(left[:-2], right[:-2])) * rows * columns
    if size * left[-1] > _MAX_PRODUCT:
        raise ValueError("a product of constants that takes too long")
    return size


def _evaluate(node: Node, given: Sequence[Array | None]) -> list[Array]:
    newest = defs.onnx_opset_version()
    opset = node.opset
    if node.op in QUANTIZE and node.proto.domain == "com.microsoft":
        opset = newest
    elif node.op in QUANTIZE and opset is not None and 10 <= opset < _QUANTIZE_FROM:
        opset = _QUANTIZE_FROM
    if opset is None or not 1 <= opset <= newest:
        raise Unfoldable(
            f"is computed by {node.label} of opset {opset}, the onnx package knows up to {newest}"
        )
    names = [f"in{at}" if array is not None else "" for at, array in enumerate(given)]
    outputs = [f"out{at}" if name else "" for at, name in enumerate(node.proto.output)]
    proto = NodeProto(op_type=node.op, input=names, output=outputs, attribute=node.proto.attribute)
    feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
    made = [name for name in outputs if name]
    inputs = [helper.make_empty_tensor_value_info(name) for name in feeds]
    results = [helper.make_empty_tensor_value_info(name) for name in made]
    graph = helper.make_graph([proto], "one node", inputs, results)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays = list(ReferenceEvaluator(graph, {"": opset}).run(None, feeds))
    except _EVALUATION_ERRORS as error:
        told = f"{type(error).__name__}: {error}"[:200]
        raise Unfoldable(f"is computed by {node.label}, which onnx cannot evaluate: {told}") from error
    by_name = dict(zip(made, map(np.asarray, arrays), strict=False))
    if any(array.dtype.hasobject for array in by_name.values()):
        raise Unfoldable(f"is computed by {node.label}, which makes no numbers")
    return [by_name.get(name, np.zeros(0)) for name in outputs]


class State(IntEnum):
    """What a value is when the graph runs."""

    CONSTANT = 0
    LOOSE = 1  # computed from shapes or small inputs: neither a weight nor an activation
    CARRIES = 2  # has the numbers of a weight, in a form that is decided at run time
    ACTIVE = 3


class Flow:
    """The state and the shape of every value of a file."""

    def __init__(self, values: GraphValues) -> None:
        self.file = values.file
        self._states: dict[int, State] = {}
        self._chosen: dict[int, State] = {}  # of the outputs of an If
        self._shapes: dict[int, tuple[int, ...] | None] = {}
        for node in values.nodes:
            self._settle(node)

    def of_node(self, node: Node) -> State:
        """The state of a node's results; an If has one for each, see `state`."""
        return self._states.get(id(node), State.ACTIVE)

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a constant, or has the numbers of a weight, in a form that is decided at run time."""
        return self.state(value) in (State.CONSTANT, State.CARRIES)

    def state(self, value: Value | None) -> State:
        if value is None:
            return State.LOOSE
        value = resolved(value)
        if value.stored is not None:
            return State.CONSTANT
        node = value.maker
        if node is None:
            return State.ACTIVE if value.rank is None or value.rank > 1 else State.LOOSE
        if node.op == "If" and id(node) in self._states:
            return self._chosen.get(id(value), State.ACTIVE)
        return self._states.get(id(node), State.ACTIVE)

    def _settle(self, wanted: Node) -> None:
        """Find the state of a node, after those of the nodes before it; these may form a circle."""
        stack, begun = [wanted], set[int]()
        while stack:
            node = stack[-1]
            if id(node) in self._states:
                stack.pop()
                continue
            before: list[Node] = []
            if id(node) not in begun:
                begun.add(id(node))
                values = [*filter(None, node.inputs), *(each for branch in node.branches for each in branch)]
                makers = [each.maker for each in map(resolved, values) if each.stored is None and each.maker]
                before = [each for each in makers if id(each) not in self._states and id(each) not in begun]
            if before:
                stack += before
                continue
            self._states[id(node)] = self._state_of(node)
            stack.pop()

    def _state_of(self, node: Node) -> State:
        op = node.op
        if op == "If":
            for output in node.outputs:
                given = [self._carried(v) for v in _branch_values(node, output)]
                self._chosen[id(output)] = max(given, default=State.ACTIVE)
            return State.ACTIVE
        given = [self.state(each) for each in node.inputs if each is not None]
        if not given or op in _RANDOM:
            return State.LOOSE
        if node.has_bodies:
            return State.ACTIVE
        if max(given) == State.CONSTANT:
            return State.CONSTANT
        if op in ("Shape", "Size", "Range", "ConstantOfShape"):
            return State.LOOSE
        if op in LOOKUPS and self.looks_up(node):
            return State.ACTIVE
        if op in LOOKUPS or op in ELEMENTWISE or op in MOVED:
            data = [each for each in node.data_inputs() if each is not None]
            return max(map(self._carried, data), default=State.LOOSE)
        return State.ACTIVE

    def _carried(self, value: Value) -> State:
        state = self.state(value)
        return State.CARRIES if state == State.CONSTANT else state

    def looks_up(self, node: Node) -> bool:
        """Whether a Gather takes rows of one constant matrix, as an embedding does."""
        data = node.input(0)
        if data is None or self.state(data) != State.CONSTANT:
            return False
        shape = self.shape(data)
        if shape is None:
            shape = next((each.shape for each in sources_of(data, data_only=True)), ())
        return len(shape) <= 2

    def shape(self, value: Value, depth: int = 0) -> tuple[int, ...] | None:
        """The shape of a constant, if it is known without computing it."""
        value = resolved(value)
        if value.stored is not None:
            return value.stored.shape
        if id(value) not in self._shapes:
            self._shapes[id(value)] = None  # in a circle
            self._shapes[id(value)] = self._made_shape(value.maker, depth) if value.maker else None
        return self._shapes[id(value)]

    def _made_shape(self, node: Node, depth: int) -> tuple[int, ...] | None:
        op = node.op
        if depth > _MAX_DEPTH or not node.inputs or node.inputs[0] is None:
            return None
        if op in ("Cast", "Identity", "DequantizeLinear", "QuantizeLinear", "Neg", "Abs", "Round"):
            return self.shape(node.inputs[0], depth + 1)
        if op == "Transpose" and (shape := self.shape(node.inputs[0], depth + 1)) is not None:
            perm = node.ints("perm") or list(range(len(shape)))[::-1]
            return tuple(shape[at] for at in perm) if sorted(perm) == list(range(len(shape))) else None
        if op in ("Mul", "Add", "Sub", "Div"):
            shapes = [self.shape(each, depth + 1) for each in node.inputs if each is not None]
            known = [shape for shape in shapes if shape is not None]
            with contextlib.suppress(ValueError):
                return np.broadcast_shapes(*known) if len(known) == len(shapes) else None
        return None

    def bases(self, value: Value, axis: int) -> Iterator[tuple[Value, int, int | None]]:
        """The values that an operand is a form of, one for each branch of an If: value, dimension, its size.

        Raises:
            Unfoldable: it is not such a form, or not one that is understood.
        """
        pending: list[tuple[Value, tuple[Node, ...]]] = [(resolved(value), ())]
        taken = 0
        while pending:
            now, steps = pending.pop()
            taken += 1
            if taken > _MAX_BRANCHES + MAX_CHAIN:
                raise Unfoldable("more choices lie before it than are followed")
            node = now.maker
            if now.stored is not None:
                node = None
            if node is not None and node.op == "If":
                pending += [(resolved(v), steps) for v in _branch_values(node, now)]
            elif node is not None and (data := node.input(0)) and self._keeps(node):
                pending.append((resolved(data), (*steps, node)))
            elif self.state(now) != State.CONSTANT:
                if self.state(now) == State.CARRIES:
                    raise Unfoldable(f"{node.label if node else now.name} decides about it only when it runs")
            else:
                shape = self.shape(now)
                if shape is None:
                    raise Unfoldable("its shape is not known before it is computed")
                at = self._axis(shape, steps, axis)
                yield now, at - len(shape), shape[at]

    def _keeps(self, node: Node) -> bool:
        """Whether a node only moves or converts the numbers of its first input, or chooses matrices of a stack."""
        if node.op == "Cast":
            return node.number("to", 0) in FLOATS
        if node.op == "Gather":
            data = node.inputs[0]
            shape = self.shape(data) if data else None
            constant = all(self.state(each) == State.CONSTANT for each in node.inputs)
            return not constant or (shape is not None and len(shape) > 2)
        return node.op in ("Identity", "Transpose", "Squeeze", "Unsqueeze", "Expand")

    def _axis(self, shape: tuple[int, ...], steps: Sequence[Node], axis: int) -> int:
        """Which dimension of a base the one of an operand is, `steps` from the operand back to the base.

        Dimensions are counted from the end: how many an index puts before them may not be known.
        """
        dims: list[int | None] = list(range(len(shape)))
        open_front = False
        for node in reversed(steps):
            if node.op == "Transpose":
                perm = node.ints("perm")
                if perm is None:
                    perm = list(range(len(dims)))[::-1]
                    if open_front:
                        raise Unfoldable(f"how many dimensions {node.label} has is not known")
                if sorted(perm) != list(range(len(perm))) or len(perm) < len(dims) or len(perm) > 64:
                    raise Unfoldable(f"{node.label} does not fit the shape {list(shape)}")
                if len(perm) > len(dims) and not open_front:
                    raise Unfoldable(f"{node.label} does not fit the shape {list(shape)}")
                full = [None] * (len(perm) - len(dims)) + dims
                dims, open_front = [full[at] for at in perm], False
            elif node.op in ("Squeeze", "Unsqueeze"):
                dims = self._squeezed(node, dims, shape, open_front)
            elif node.op == "Expand":
                open_front = True
            elif node.op == "Gather":
                at = node.number("axis", 0)
                at = at + len(dims) if at < 0 else at
                if open_front or not 0 <= at < len(dims) or len(dims) < 3:
                    raise Unfoldable(f"{node.label} chooses of it in a way that is not understood")
                count = _rank(node.input(1))
                if count is None and at != 0:
                    raise Unfoldable(f"{node.label} chooses along its dimension {at}")
                dims[at : at + 1] = [None] * (count or 0)
                open_front = count is None
        if len(dims) < -axis:
            raise Unfoldable(f"its dimensions {list(shape)} are too few")
        found = dims[axis]
        if found is None:
            raise Unfoldable(f"the dimension that is summed over is none of its own {list(shape)}")
        return found

    def _squeezed(
        self, node: Node, dims: list[int | None], shape: tuple[int, ...], open_front: bool
    ) -> list[int | None]:
        axes = node.ints("axes")
        if axes is None and (given := node.input(1)) is not None:
            axes = self._small(given)
            if axes is None:
                raise Unfoldable(f"{node.label} takes its axes when it runs")
        if node.op == "Squeeze" and axes is None:
            return [at for at in dims if at is not None and shape[at] != 1]
        if axes is None:
            raise Unfoldable(f"{node.label} has no axes")
        if open_front:
            if axes == [0]:  # of the front
                return dims
            raise Unfoldable(f"how many dimensions {node.label} has is not known")
        rank = len(dims) + (len(axes) if node.op == "Unsqueeze" else 0)
        places = {at + rank if at < 0 else at for at in axes}
        if len(places) != len(axes) or not all(0 <= at < rank for at in places) or rank > 64:
            raise Unfoldable(f"{node.label} does not fit the shape {list(shape)}")
        if node.op == "Squeeze":
            return [each for at, each in enumerate(dims) if at not in places]
        rest = iter(dims)
        return [None if at in places else next(rest) for at in range(rank)]

    def _small(self, value: Value) -> list[int] | None:
        """The integers of a small constant."""
        stored = resolved(value).stored
        if stored is None or math.prod(stored.shape) > 64 or len(stored.shape) > 1:
            return None
        return [int(each) for each in self.file.read_stored(stored.name, stored.holds).reshape(-1).tolist()]


def _rank(index: Value | None) -> int | None:
    """How many dimensions an index has, if that is known."""
    if index is None:
        return None
    index = resolved(index)
    return len(index.stored.shape) if index.stored is not None else index.rank


def _branch_values(node: Node, output: Value) -> list[Value]:
    """What the branches of an If return for one of its outputs."""
    at = next((at for at, each in enumerate(node.outputs) if each is output), None)
    return [] if at is None else [branch[at] for branch in node.branches if at < len(branch)]
