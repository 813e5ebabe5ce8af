"""What the constants of an ONNX graph become: their computed values, and in which form they reach an operand.

Values are computed node by node with onnx's reference evaluator. A file is untrusted: an operator only runs if
the size of its result is known before and is at most a small multiple of what the file stores.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from onnx import NodeProto, TensorProto, checker, defs, helper
from onnx.reference import ReferenceEvaluator

from spp_fx.exporters.onnx.graph_values import GraphValues, Node, Stored, Value, reachable, sources_of
from spp_fx.exporters.onnx.onnx_file import Array, OnnxFile
from spp_fx.exporters.onnx.operators import (
    BROADCAST,
    FLOATS,
    FOLDED,
    FOLLOWED,
    LOOKUPS,
    QUANTIZE,
    RANDOM,
)

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
_CHUNK = 1 << 20  # elements that are scattered at a time
_QUANTIZE_FROM = 19
"""The evaluator has `QUANTIZE` from this version on; they compute the same per tensor and per axis."""
_EVALUATION_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, NotImplementedError,
    RuntimeError, TypeError, ValueError, checker.ValidationError,
)  # fmt: skip
"""What the evaluator raises of a node that is wrong or that it does not know: it checks nothing beforehand."""


class Unfoldable(Exception):
    """A value cannot be computed; the text says why, as the reason of a site."""


def chain_of(wanted: Value) -> list[Node]:
    """The nodes that compute a value of constants, each after those that it needs.

    Raises:
        Unfoldable: they are too many, or one of them is not supported.
    """
    nodes: set[Node] = set()
    for value in reachable([wanted], lambda value: value.maker.inputs if value.maker else ()):
        if (node := value.maker) is None:
            continue
        if node.has_bodies or node.op not in FOLDED:
            raise Unfoldable(f"is computed by {node.label}, an operator that is not supported here")
        nodes.add(node)
        if len(nodes) > MAX_CHAIN:
            raise Unfoldable(f"is computed by more than {MAX_CHAIN} operators")
    return sorted(nodes, key=lambda node: node.position)


def fold(wanted: Value, file: OnnxFile) -> Array:
    """The numbers of a value that is computed from constants.

    Raises:
        Unfoldable: an operator is not supported, makes too much, or fails.
        FormatError: a stored tensor is damaged.
    """
    if isinstance(wanted, Stored):
        return file.read_stored(wanted.name, wanted.holds)
    order = chain_of(wanted)
    last_reader = {value: node for node in order for value in node.inputs if value is not None}
    limit = _SMALL + sum(value.numel for value in last_reader if isinstance(value, Stored))
    arrays: dict[Value, Array] = {}
    work = 0
    for node in order:
        for value in node.inputs:
            if value is not None and value not in arrays:
                if not isinstance(value, Stored):
                    raise Unfoldable(f"is computed by {node.label} from a value that is not in the file")
                arrays[value] = file.read_stored(value.name, value.holds)
        given = [None if value is None else arrays[value] for value in node.inputs]
        for value in {*node.inputs}:
            if value is not None and last_reader[value] is node:
                del arrays[value]
        try:
            size = _result_size(node, given)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise Unfoldable(f"is computed by {node.label}, whose inputs do not fit: {error}") from error
        work += size
        if size > _MAX_GROWTH * limit or work > _MAX_WORK * limit:
            raise Unfoldable(
                f"is computed by {node.label}, whose {size} elements are too many for {limit} stored ones"
            )
        arrays |= zip(node.outputs, _evaluate(node, given), strict=False)
    return arrays[wanted]


def _result_size(node: Node, given: Sequence[Array | None]) -> int:
    """How many elements a node makes at most.

    Raises:
        ValueError: its inputs do not belong together, or it takes too long.
    """
    op = node.op
    arrays = [array for array in given if array is not None]
    shapes = [array.shape for array in arrays]
    if op in BROADCAST or op == "Clip":
        return math.prod(np.broadcast_shapes(*shapes))
    if op == "ConstantOfShape":
        return _product_of(arrays[0])
    if op == "Expand":
        return math.prod(np.broadcast_shapes(shapes[0], tuple(map(int, arrays[1].reshape(-1)))))
    if op == "Tile":
        return arrays[0].size * _product_of(arrays[1])
    if op == "Range":
        start, limit, delta = (float(each.reshape(-1)[0]) for each in arrays[:3])
        return max(0, math.ceil((limit - start) / delta)) if delta else 2**62
    if op == "Gather":
        return arrays[1].size * (arrays[0].size // max(1, shapes[0][node.number("axis", 0)]))
    if op == "GatherElements":
        return arrays[1].size
    if op == "Concat":
        return sum(each.size for each in arrays)
    if op == "MatMul":
        return _product_size(shapes[0], shapes[1])
    if op in QUANTIZE:
        return _quantized_size(node, arrays)
    if op == "Split" and node.number("num_outputs", len(node.outputs)) != len(node.outputs):
        raise ValueError(f"{node.number('num_outputs', 0)} outputs are {len(node.outputs)}")
    text = node.number("to", 0) in (0, TensorProto.STRING) if op == "Cast" else arrays[-1].dtype.hasobject
    if op in ("Cast", "CastLike") and text:
        raise ValueError("text where numbers are expected")
    return max(each.size for each in arrays)


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
    attributes = node.proto.attribute
    if any(each.t.data_location == TensorProto.EXTERNAL for each in attributes if each.HasField("t")):
        raise Unfoldable(f"is computed by {node.label}, which has an attribute in another file")
    names = [f"in{at}" if array is not None else "" for at, array in enumerate(given)]
    feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
    outputs = [f"out{at}" if name else "" for at, name in enumerate(node.proto.output)]
    made = [name for name in outputs if name]
    graph = helper.make_graph(
        [NodeProto(op_type=node.op, input=names, output=outputs, attribute=attributes)],
        "one node",
        [helper.make_empty_tensor_value_info(name) for name in feeds],
        [helper.make_empty_tensor_value_info(name) for name in made],
    )
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = ReferenceEvaluator(graph, {"": opset})
            first = feeds.get("in0")
            if node.op == "ScatterElements":
                arrays = [_scatter(node, *feeds.values())]
            elif node.op == "ConstantOfShape" and first is not None:  # one number takes no memory
                (one,) = evaluator.run(None, {"in0": np.ones(1, np.int64)})
                arrays = [np.broadcast_to(np.reshape(one, ()), tuple(first))]
            elif node.op == "Cast" and first is not None and first.ndim and not any(first.strides):
                (one,) = evaluator.run(None, {"in0": first[(slice(0, 1),) * first.ndim]})
                arrays = [np.broadcast_to(one, first.shape)]
            else:
                arrays = list(evaluator.run(None, feeds))
    except _EVALUATION_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise Unfoldable(f"is computed by {node.label}, which cannot be evaluated: {reason}") from error
    by_name = dict(zip(made, map(np.asarray, arrays), strict=False))
    if any(array.dtype.hasobject for array in by_name.values()):
        raise Unfoldable(f"is computed by {node.label}, whose result is not numeric")
    return [by_name.get(name, np.zeros(0)) for name in outputs]


def _scatter(node: Node, data: Array, positions: Array, updates: Array) -> Array:
    """ScatterElements along rows: onnx's own goes element by element, and does not check the positions."""
    width = data.shape[-1]
    if node.attributes.get("reduction", b"none") != b"none" or node.number("axis", 0) not in (1, -1):
        raise ValueError("its axis or reduction is not supported")
    if data.ndim != 2 or positions.shape != updates.shape or len(positions) != len(data):
        raise ValueError(
            f"{list(positions.shape)} positions, {list(updates.shape)} values, {list(data.shape)}"
        )
    if updates.dtype != data.dtype or positions.dtype.kind != "i":
        raise ValueError(f"values of {updates.dtype} at positions of {positions.dtype} in {data.dtype}")
    bits = f"u{data.itemsize}"  # numpy copies its own types faster than bfloat16
    result, updates = np.array(data.view(bits), order="C"), updates.view(bits)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(data), step):
        rows = slice(start, start + step)
        at = positions[rows].astype(np.int64)
        if (at[:, :1] < 0).any() or (at[:, -1:] >= width).any() or (at[:, 1:] <= at[:, :-1]).any():
            raise ValueError(f"its positions do not ascend within {width} columns")
        at += np.arange(len(at))[:, None] * width
        np.put(result[rows], at, updates[rows], mode="clip")
    return result.view(data.dtype)


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
        self._states: dict[Node, State] = {}
        self._chosen: dict[Value, State] = {}  # of the outputs of an If
        self._shapes: dict[Value, tuple[int, ...] | None] = {}
        for node in sorted(values.nodes, key=lambda node: node.position):
            self._states[node] = self._state_of(node)
            for output in node.outputs[:1]:
                self._shapes[output] = self._made_shape(node)

    def of_node(self, node: Node) -> State:
        """The state of a node's results; an If has one for each, see `state`."""
        return self._states.get(node, State.ACTIVE)

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a constant, or has the numbers of a weight, in a form that is decided at run time."""
        return self.state(value) in (State.CONSTANT, State.CARRIES)

    def state(self, value: Value | None) -> State:
        if value is None:
            return State.LOOSE
        if isinstance(value, Stored):
            return State.CONSTANT
        if value.maker is None:
            return State.ACTIVE if value.rank is None or value.rank > 1 else State.LOOSE
        return self._chosen.get(value, self.of_node(value.maker))

    def _state_of(self, node: Node) -> State:
        if node.op == "If":
            for output in node.outputs:
                given = map(self._carried, node.branch_values(output))
                self._chosen[output] = max(given, default=State.ACTIVE)
            return State.ACTIVE
        given = [self.state(each) for each in node.inputs if each is not None]
        if not given or node.op in RANDOM:
            return State.LOOSE
        if node.has_bodies:
            return State.ACTIVE
        if max(given) == State.CONSTANT:
            return State.CONSTANT
        if node.op in ("Shape", "Size", "Range", "ConstantOfShape"):
            return State.LOOSE
        if node.op in FOLLOWED and not self.looks_up(node):
            data = [each for each in node.data_inputs() if each is not None]
            return max(map(self._carried, data), default=State.LOOSE)
        return State.ACTIVE

    def _carried(self, value: Value) -> State:
        state = self.state(value)
        return State.CARRIES if state == State.CONSTANT else state

    def looks_up(self, node: Node) -> bool:
        """Whether a node takes rows of one constant matrix, as an embedding does."""
        data = node.input(0)
        if node.op not in LOOKUPS or data is None or self.state(data) != State.CONSTANT:
            return False
        shape = self.shape(data)
        if shape is None:
            shape = next((each.shape for each in sources_of(data, data_only=True)), ())
        return len(shape) <= 2

    def shape(self, value: Value) -> tuple[int, ...] | None:
        """The shape of a constant, if it is known without computing it."""
        return value.shape if isinstance(value, Stored) else self._shapes.get(value)

    def _made_shape(self, node: Node) -> tuple[int, ...] | None:
        shapes = [self.shape(each) for each in node.inputs if each is not None]
        known = [shape for shape in shapes if shape is not None]
        if not known or node.inputs[0] is None:
            return None
        if node.op in ("Mul", "Add", "Sub", "Div"):
            with contextlib.suppress(ValueError):
                return np.broadcast_shapes(*known) if len(known) == len(shapes) else None
        if node.op == "Reshape" and self._states[node] == State.CONSTANT and (sizes := node.input(1)):
            wanted = self._small(sizes)
            return tuple(wanted) if wanted and min(wanted) > 0 else None
        if shapes[0] is None:
            return None
        if node.op in ("Cast", "Identity", "DequantizeLinear", "QuantizeLinear", "Neg", "Abs", "Round"):
            return shapes[0]
        if node.op == "Transpose":
            perm = node.ints("perm") or [*range(len(shapes[0]))][::-1]
            if sorted(perm) == [*range(len(shapes[0]))]:
                return tuple(shapes[0][at] for at in perm)
        return None

    def bases(self, value: Value, axis: int) -> Iterator[tuple[Value, int, int | None]]:
        """The values that an operand is a form of, one for each branch of an If: value, dimension, its size.

        Raises:
            Unfoldable: it is not such a form, or not one that is supported.
        """
        pending: list[tuple[Value, tuple[Node, ...]]] = [(value, ())]
        taken = 0
        while pending:
            now, steps = pending.pop()
            node = now.maker
            taken += 1
            if taken > _MAX_BRANCHES + MAX_CHAIN:
                raise Unfoldable("it depends on too many branches")
            if node is not None and node.op == "If":
                pending += [(each, steps) for each in node.branch_values(now)]
            elif node is not None and (data := node.input(0)) and self._keeps(node):
                pending.append((data, (*steps, node)))
            elif self.state(now) == State.CARRIES:
                raise Unfoldable(f"{node.label if node else now.name} computes it at run time")
            elif self.state(now) == State.CONSTANT:
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
                        raise Unfoldable(f"the rank of {node.label} is not known")
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
                    raise Unfoldable(f"{node.label} selects from it in a way that is not supported")
                count = _rank(node.input(1))
                if count is None and at != 0:
                    raise Unfoldable(f"{node.label} selects along its dimension {at}")
                dims[at : at + 1] = [None] * (count or 0)
                open_front = count is None
        if len(dims) < -axis:
            raise Unfoldable(f"its dimensions {list(shape)} are too few")
        found = dims[axis]
        if found is None:
            raise Unfoldable(f"the dimension that is summed over is not one of its own {list(shape)}")
        return found

    def _squeezed(
        self, node: Node, dims: list[int | None], shape: tuple[int, ...], open_front: bool
    ) -> list[int | None]:
        axes = node.ints("axes")
        if axes is None and (given := node.input(1)) is not None:
            axes = self._small(given)
            if axes is None:
                raise Unfoldable(f"{node.label} gets its axes at run time")
        if node.op == "Squeeze" and axes is None:
            return [at for at in dims if at is not None and shape[at] != 1]
        if axes is None:
            raise Unfoldable(f"{node.label} has no axes")
        if open_front:
            if axes == [0]:  # of the front
                return dims
            raise Unfoldable(f"the rank of {node.label} is not known")
        rank = len(dims) + (len(axes) if node.op == "Unsqueeze" else 0)
        positions = {at + rank if at < 0 else at for at in axes}
        if len(positions) != len(axes) or not all(0 <= at < rank for at in positions) or rank > 64:
            raise Unfoldable(f"{node.label} does not fit the shape {list(shape)}")
        if node.op == "Squeeze":
            return [each for at, each in enumerate(dims) if at not in positions]
        rest = iter(dims)
        return [None if at in positions else next(rest) for at in range(rank)]

    def _small(self, value: Value) -> list[int] | None:
        if not isinstance(value, Stored) or value.numel > 64 or len(value.shape) > 1:
            return None
        return [int(each) for each in self.file.read_stored(value.name, value.holds).reshape(-1).tolist()]


def _rank(index: Value | None) -> int | None:
    return len(index.shape) if isinstance(index, Stored) else index and index.rank
