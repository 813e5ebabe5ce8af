"""What an ONNX graph computes of constants alone, node by node with onnx's reference evaluator, within bounds.

A file is untrusted: an operator is only run where the size of what it makes is known before, and is at most a
small multiple of what the file stores.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, checker, defs, helper
from onnx.reference import ReferenceEvaluator

from spp_fx.exporters.onnx.values import Made, Stored, Value, same

Array = npt.NDArray[Any]

MAX_CHAIN = 256
"""Nodes between constants and the weight that they become, at most."""
_MAX_GROWTH = 64
"""Elements of one result for each that is stored, at most; `_MAX_WORK` of all results together."""
_MAX_WORK = 512
_MAX_SOURCES = 1 << 12
"""Values that are followed back to what they come of."""
_SMALL = 1 << 16
"""Elements that are always allowed."""
_MAX_PRODUCT = 1 << 32
"""Multiplications of a product of two constants."""

_UNARY = frozenset({
    "Abs", "BitwiseNot", "Cast", "CastLike", "Ceil", "Clip", "DequantizeLinear", "Exp", "Flatten", "Floor",
    "Identity", "Log", "Neg", "Not", "QuantizeLinear", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round",
    "Shape", "Sigmoid", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Tanh", "Transpose", "Trilu",
    "Unsqueeze",
})  # fmt: skip
"""Operators whose result is no larger than their first input, once `_check` has looked at the exceptions."""
BROADCAST = frozenset({
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where",
    "Xor",
})  # fmt: skip
_SIZED = frozenset({
    "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "MatMul", "Range", "Tile",
})  # fmt: skip
FOLDED = _UNARY | BROADCAST | _SIZED
QUANTIZE = {f"com.microsoft.{op}": op for op in ("DequantizeLinear", "QuantizeLinear")}
"""Operators of onnxruntime that are ONNX's own, for types that ONNX took later."""

_QUANTIZE_FROM = 19
"""The evaluator has these operators from this version on; they compute the same per tensor and per axis."""

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


def chain_of(wanted: Value) -> list[Made]:
    """The nodes that compute a value of constants, each after those that it needs.

    Raises:
        Unfoldable: they are too many, run in a circle, or one of them is not understood.
    """
    order: list[Made] = []
    state: dict[int, bool] = {}  # node -> whether all that it needs is in `order`
    stack = [same(wanted)]
    while stack:
        value = stack[-1]
        made = value.maker
        if value.stored is not None or made is None or state.get(id(made)):
            stack.pop()
            continue
        if id(made) in state:
            stack.pop()
            state[id(made)] = True
            order.append(made)
            continue
        state[id(made)] = False
        if len(state) > MAX_CHAIN:
            raise Unfoldable(f"is computed by more than {MAX_CHAIN} operators")
        if made.bodies or (QUANTIZE.get(made.op) or made.op) not in FOLDED:
            raise Unfoldable(f"is computed by {made.label}, an operator that is not followed")
        for each in made.inputs:
            if each is not None and (before := same(each)).stored is None:
                if before.maker is not None and state.get(id(before.maker)) is False:
                    raise Unfoldable("is computed in a circle")
                stack.append(before)
    return order


def sources_of(wanted: Value, *, data_only: bool = False) -> Iterator[Stored]:
    """The stored tensors that a value is computed of; those that it is a form of, without scales and shapes."""
    seen: set[int] = set()
    stack = [same(wanted)]
    while stack and len(seen) < _MAX_SOURCES:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.stored is not None:
            yield value.stored
        elif value.maker is not None:
            stack += [
                same(each) for each in (data_of(value.maker) if data_only else value.maker.inputs) if each
            ]
            stack += [same(each) for branch in value.maker.branches for each in branch]


_DATA_FIRST = frozenset({
    "Cast", "CastLike", "Clip", "CumSum", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "Pad", "QuantizeLinear", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceSum", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze",
})  # fmt: skip


def data_of(made: Made) -> list[Value | None]:
    """The inputs of a node whose numbers its result has, without indices, shapes, scales and conditions."""
    op = QUANTIZE.get(made.op) or made.op
    if op in _DATA_FIRST:
        return made.inputs[:1]
    if op in ("Where", "ScatterElements", "ScatterND"):
        return made.inputs[1:3] if op == "Where" else [*made.inputs[:1], *made.inputs[2:3]]
    return made.inputs


def fold(wanted: Value, read: Callable[[Stored], Array]) -> Array:
    """The numbers of a value that is computed of constants.

    Args:
        read: the numbers of a stored tensor.

    Raises:
        Unfoldable: an operator is not understood, makes too much, or fails.
        FormatError: a stored tensor is damaged.
    """
    target = same(wanted)
    if target.stored is not None:
        return read(target.stored)
    order = chain_of(target)
    stored = {each.name: each for made in order for v in made.inputs if v and (each := same(v).stored)}
    limit = _SMALL + sum(max(0, math.prod(each.shape)) for each in stored.values())
    left = {id(v): 0 for made in order for v in map(_same, made.inputs) if v}
    for made in order:
        for value in map(_same, made.inputs):
            if value:
                left[id(value)] += 1
    arrays: dict[int, Array] = {}
    work = 0
    for made in order:
        given: list[Array | None] = []
        for value in map(_same, made.inputs):
            if value is not None and id(value) not in arrays:
                if value.stored is None:
                    raise Unfoldable(f"is computed by {made.label} of something that is not there")
                arrays[id(value)] = read(value.stored)
            given.append(None if value is None else arrays[id(value)])
        size = _checked_size(made, given)
        work += size
        if size > _MAX_GROWTH * limit or work > _MAX_WORK * limit:
            raise Unfoldable(
                f"is computed by {made.label}, which makes {size} elements of {limit} at most stored"
            )
        for value, array in zip(made.outputs, _run(made, given), strict=False):
            arrays[id(value)] = array
        for value in map(_same, made.inputs):
            if value:
                left[id(value)] -= 1
                if not left[id(value)] and value is not target:
                    arrays.pop(id(value), None)
    return arrays[id(target)]


def _same(value: Value | None) -> Value | None:
    return None if value is None else same(value)


def _checked_size(made: Made, given: Sequence[Array | None]) -> int:
    """How many elements a node makes at most, said before it is run."""
    try:
        return _size(made, given)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise Unfoldable(f"is computed by {made.label}, whose inputs do not fit: {error}") from error


def _size(made: Made, given: Sequence[Array | None]) -> int:
    op = QUANTIZE.get(made.op) or made.op
    arrays = [array for array in given if array is not None]
    shapes = [array.shape for array in arrays]
    if op in BROADCAST:
        return math.prod(np.broadcast_shapes(*shapes))
    if op == "ConstantOfShape":
        return _product(arrays[0])
    if op == "Expand":
        sizes = [int(size) for size in arrays[1].reshape(-1)]
        return math.prod(np.broadcast_shapes(shapes[0], tuple(sizes)))
    if op == "Tile":
        return arrays[0].size * _product(arrays[1])
    if op == "Range":
        start, limit, delta = (float(each.reshape(-1)[0]) for each in arrays[:3])
        return max(0, math.ceil((limit - start) / delta)) if delta else 2**62
    if op == "Gather":
        axis = made.number("axis", 0)
        return arrays[1].size * (arrays[0].size // max(1, shapes[0][axis]))
    if op == "MatMul":
        return _product_size(shapes[0], shapes[1])
    if op == "Concat":
        return sum(each.size for each in arrays)
    if op == "GatherElements":
        return arrays[1].size
    size = max(each.size for each in arrays)
    if op == "Split" and made.number("num_outputs", len(made.outputs)) != len(made.outputs):
        raise ValueError(f"{made.number('num_outputs', 0)} outputs are {len(made.outputs)}")
    if op in ("QuantizeLinear", "DequantizeLinear"):
        return _quantized_size(made, arrays)
    if op == "Cast" and made.number("to", 0) in (0, TensorProto.STRING):
        raise ValueError("text where numbers are expected")
    if op == "CastLike" and arrays[1].dtype.hasobject:
        raise ValueError("text where numbers are expected")
    if op == "Clip":
        return math.prod(np.broadcast_shapes(*shapes))
    return size


def _quantized_size(made: Made, arrays: Sequence[Array]) -> int:
    block = made.number("block_size", 0)
    axis, shape = made.number("axis", 1), arrays[0].shape
    size = arrays[0].size
    for scale in arrays[1:3]:
        if block > 0 and scale.ndim:
            size = max(size, scale.size * block)
        elif scale.size > 1 and (scale.ndim != 1 or scale.size != shape[axis]):
            raise ValueError(f"scales of {list(scale.shape)} for {list(shape)}")
    return size


def _product(sizes: Array) -> int:
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


def _run(made: Made, given: Sequence[Array | None]) -> list[Array]:
    node = helper.make_node("Identity", [], [])
    node.CopyFrom(made.node)
    node.name = ""
    newest = defs.onnx_opset_version()
    opset = newest if made.op in QUANTIZE else made.opset
    if made.op in QUANTIZE.values() and opset is not None and 10 <= opset < _QUANTIZE_FROM:
        opset = _QUANTIZE_FROM
    if made.op in QUANTIZE:
        node.domain = ""
    if opset is None or not 1 <= opset <= newest:
        raise Unfoldable(
            f"is computed by {made.label} of opset {opset}, the onnx package knows up to {newest}"
        )
    node.domain = ""
    names = [f"in{at}" if array is not None else "" for at, array in enumerate(given)]
    outputs = [f"out{at}" if name else "" for at, name in enumerate(made.node.output)]
    del node.input[:], node.output[:]
    node.input.extend(names)
    node.output.extend(outputs)
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_empty_tensor_value_info(name) for name in names if name],
        [helper.make_empty_tensor_value_info(name) for name in outputs if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = list(ReferenceEvaluator(model).run(None, feeds))
    except _EVALUATION_ERRORS as error:
        told = f"{type(error).__name__}: {error}"[:200]
        raise Unfoldable(f"is computed by {made.label}, which onnx cannot evaluate: {told}") from error
    arrays: dict[str, Array] = dict(
        zip([n for n in outputs if n], (np.asarray(each) for each in results), strict=False)
    )
    if any(array.dtype.hasobject for array in arrays.values()):
        raise Unfoldable(f"is computed by {made.label}, which makes no numbers")
    return [arrays.get(name, np.zeros(0)) for name in outputs]
