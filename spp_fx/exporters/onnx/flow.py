"""What the values of a graph are when it runs, constants, weights in disguise or activations, and of which form."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from onnx import TensorProto

from spp_fx.exporters.onnx.fold import BROADCAST, MAX_CHAIN, QUANTIZE, Array, Unfoldable, data_of, sources_of
from spp_fx.exporters.onnx.values import Made, Stored, Value, same

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
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
LOOKUPS = ("Gather", "GatherND", "GatherElements")
_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)
_MAX_BRANCHES = 64
_MAX_DEPTH = 64


class State(IntEnum):
    """What a value is when the graph runs."""

    CONSTANT = 0
    LOOSE = 1  # of shapes, small inputs: neither a weight nor an activation
    CARRIES = 2  # a weight in a form that only the run decides
    ACTIVE = 3


@dataclass
class Flow:
    """The state and the shape of every value.

    Attributes:
        nodes: of the file, in any order.
        read: the numbers of a stored tensor.
    """

    nodes: Sequence[Made]
    read: Callable[[Stored], Array]
    _states: dict[int, State] = field(default_factory=dict)
    _chosen: dict[int, State] = field(default_factory=dict)
    _shapes: dict[int, tuple[int, ...] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for made in self.nodes:
            self._settle(made)

    def of_node(self, made: Made) -> State:
        """What a node's results are; those of an If are told one by one, by `state`."""
        return self._states.get(id(made), State.ACTIVE)

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a constant, or a weight in a form that only the run decides."""
        return self.state(value) in (State.CONSTANT, State.CARRIES)

    def state(self, value: Value | None) -> State:
        if value is None:
            return State.LOOSE
        value = same(value)
        if value.stored is not None:
            return State.CONSTANT
        made = value.maker
        if made is None:
            return State.ACTIVE if value.rank is None or value.rank > 1 else State.LOOSE
        if made.op == "If" and id(made) in self._states:
            return self._chosen.get(id(value), State.ACTIVE)
        return self._states.get(id(made), State.ACTIVE)

    def _settle(self, wanted: Made) -> None:
        """The state of a node, after those of the nodes before it; they may come in any order, or in a circle."""
        stack, begun = [wanted], set[int]()
        while stack:
            made = stack[-1]
            if id(made) in self._states:
                stack.pop()
                continue
            before: list[Made] = []
            if id(made) not in begun:
                begun.add(id(made))
                values = [each for each in made.inputs if each] + [
                    v for branch in made.branches for v in branch
                ]
                makers = [each.maker for each in map(same, values) if each.stored is None and each.maker]
                before = [each for each in makers if id(each) not in self._states and id(each) not in begun]
            if before:
                stack += before
                continue
            self._states[id(made)] = self._state_of(made)
            stack.pop()

    def _state_of(self, made: Made) -> State:
        op = QUANTIZE.get(made.op) or made.op
        if op == "If":
            for output in made.outputs:
                given = [self._carried(v) for branch in made.branches for v in _at(branch, made, output)]
                self._chosen[id(output)] = max(given, default=State.ACTIVE)
            return State.ACTIVE
        given = [self.state(each) for each in made.inputs if each is not None]
        if not given or op in _RANDOM:
            return State.LOOSE
        if made.bodies:
            return State.ACTIVE
        if max(given) == State.CONSTANT:
            return State.CONSTANT
        if op in ("Shape", "Size", "Range", "ConstantOfShape"):
            return State.LOOSE
        if op in LOOKUPS and self.looks_up(made):
            return State.ACTIVE
        if op in LOOKUPS or op in ELEMENTWISE or op in MOVED:
            return max(
                (self._carried(each) for each in data_of(made) if each is not None), default=State.LOOSE
            )
        return State.ACTIVE

    def _carried(self, value: Value) -> State:
        state = self.state(value)
        return State.CARRIES if state == State.CONSTANT else state

    def looks_up(self, made: Made) -> bool:
        """Whether a choice takes rows of one matrix: what they are multiplied by next, is a weight, they are not."""
        data = made.inputs[0] if made.inputs else None
        if data is None or self.state(data) != State.CONSTANT:
            return False
        shape = self.shape(data)
        if shape is None:
            shape = next((each.shape for each in sources_of(data, data_only=True)), ())
        return len(shape) <= 2

    def shape(self, value: Value, depth: int = 0) -> tuple[int, ...] | None:
        """The shape of a constant, as far as it can be told without computing it."""
        value = same(value)
        if value.stored is not None:
            return value.stored.shape
        if id(value) not in self._shapes:
            self._shapes[id(value)] = None  # of what runs in a circle
            self._shapes[id(value)] = self._made_shape(value.maker, depth) if value.maker else None
        return self._shapes[id(value)]

    def _made_shape(self, made: Made, depth: int) -> tuple[int, ...] | None:
        op = QUANTIZE.get(made.op) or made.op
        if depth > _MAX_DEPTH or not made.inputs or made.inputs[0] is None:
            return None
        if op in ("Cast", "Identity", "DequantizeLinear", "QuantizeLinear", "Neg", "Abs", "Round"):
            return self.shape(made.inputs[0], depth + 1)
        if op == "Transpose" and (shape := self.shape(made.inputs[0], depth + 1)) is not None:
            perm = made.ints("perm") or list(range(len(shape)))[::-1]
            return tuple(shape[at] for at in perm) if sorted(perm) == list(range(len(shape))) else None
        if op in ("Mul", "Add", "Sub", "Div"):
            shapes = [self.shape(each, depth + 1) for each in made.inputs if each is not None]
            try:
                return (
                    np.broadcast_shapes(*[shape for shape in shapes if shape is not None])
                    if all(shape is not None for shape in shapes)
                    else None
                )
            except ValueError:
                return None
        return None

    def bases(self, value: Value, axis: int) -> Iterator[tuple[Value, int, int | None]]:
        """The values that an operand is a form of, one for each branch of an If: value, dimension, its size.

        Raises:
            Unfoldable: it is not such a form, or not one that is understood.
        """
        pending: list[tuple[Value, tuple[Made, ...]]] = [(same(value), ())]
        taken = 0
        while pending:
            now, steps = pending.pop()
            taken += 1
            if taken > _MAX_BRANCHES + MAX_CHAIN:
                raise Unfoldable("more choices lie before it than are followed")
            made = now.maker
            if now.stored is None and made is not None and made.op == "If":
                pending += [(same(v), steps) for branch in made.branches for v in _at(branch, made, now)]
            elif (
                now.stored is None
                and made is not None
                and made.inputs
                and made.inputs[0]
                and self._keeps(made)
            ):
                pending.append((same(made.inputs[0]), (*steps, made)))
            elif self.state(now) != State.CONSTANT:
                if self.state(now) == State.CARRIES:
                    raise Unfoldable(f"{made.label if made else now.name} decides about it only when it runs")
            else:
                shape = self.shape(now)
                if shape is None:
                    raise Unfoldable("its shape is not known before it is computed")
                at = self._axis(shape, steps, axis)
                yield now, at - len(shape), shape[at]

    def _keeps(self, made: Made) -> bool:
        """Whether a node only moves or converts the numbers of its first input, or chooses matrices of a stack."""
        if made.op == "Cast":
            return made.number("to", 0) in FLOATS
        if made.op == "Gather":
            data = made.inputs[0]
            shape = self.shape(data) if data else None
            constant = all(self.state(each) == State.CONSTANT for each in made.inputs)
            return not constant or (shape is not None and len(shape) > 2)
        return made.op in ("Identity", "Transpose", "Squeeze", "Unsqueeze", "Expand")

    def _axis(self, shape: tuple[int, ...], steps: Sequence[Made], axis: int) -> int:
        """Which dimension of a base the one of an operand is, `steps` from the operand back to the base.

        Dimensions are counted from the end: how many an index puts before them may not be known.
        """
        dims: list[int | None] = list(range(len(shape)))
        open_front = False
        for made in reversed(steps):
            if made.op == "Transpose":
                perm = made.ints("perm")
                if perm is None:
                    perm = list(range(len(dims)))[::-1]
                    if open_front:
                        raise Unfoldable(f"how many dimensions {made.label} has is not known")
                if sorted(perm) != list(range(len(perm))) or len(perm) < len(dims) or len(perm) > 64:
                    raise Unfoldable(f"{made.label} does not fit the shape {list(shape)}")
                if len(perm) > len(dims) and not open_front:
                    raise Unfoldable(f"{made.label} does not fit the shape {list(shape)}")
                full = [None] * (len(perm) - len(dims)) + dims
                dims, open_front = [full[at] for at in perm], False
            elif made.op in ("Squeeze", "Unsqueeze"):
                dims = self._squeezed(made, dims, shape, open_front)
            elif made.op == "Expand":
                open_front = True
            elif made.op == "Gather":
                at = made.number("axis", 0)
                at = at + len(dims) if at < 0 else at
                if open_front or not 0 <= at < len(dims) or len(dims) < 3:
                    raise Unfoldable(f"{made.label} chooses of it in a way that is not understood")
                count = self._rank(made.inputs[1]) if len(made.inputs) > 1 else None
                if count is None and at != 0:
                    raise Unfoldable(f"{made.label} chooses along its dimension {at}")
                dims[at : at + 1] = [None] * (count or 0)
                open_front = count is None
        if len(dims) < -axis:
            raise Unfoldable(f"its dimensions {list(shape)} are too few")
        found = dims[axis]
        if found is None:
            raise Unfoldable(f"the dimension that is summed over is none of its own {list(shape)}")
        return found

    def _squeezed(
        self, made: Made, dims: list[int | None], shape: tuple[int, ...], open_front: bool
    ) -> list[int | None]:
        axes = made.ints("axes")
        if axes is None and len(made.inputs) > 1 and (given := made.inputs[1]) is not None:
            axes = self._small(given)
            if axes is None:
                raise Unfoldable(f"{made.label} takes its axes when it runs")
        if made.op == "Squeeze" and axes is None:
            return [at for at in dims if at is not None and shape[at] != 1]
        if axes is None:
            raise Unfoldable(f"{made.label} has no axes")
        if open_front:
            if axes == [0]:  # of the front
                return dims
            raise Unfoldable(f"how many dimensions {made.label} has is not known")
        rank = len(dims) + (len(axes) if made.op == "Unsqueeze" else 0)
        places = {at + rank if at < 0 else at for at in axes}
        if len(places) != len(axes) or not all(0 <= at < rank for at in places) or rank > 64:
            raise Unfoldable(f"{made.label} does not fit the shape {list(shape)}")
        if made.op == "Squeeze":
            return [each for at, each in enumerate(dims) if at not in places]
        rest = iter(dims)
        return [None if at in places else next(rest) for at in range(rank)]

    def _rank(self, index: Value | None) -> int | None:
        """How many dimensions an index has, where that is known."""
        if index is None:
            return None
        index = same(index)
        if index.stored is not None:
            return len(index.stored.shape)
        return index.rank

    def _small(self, value: Value) -> list[int] | None:
        """The integers of a small constant."""
        stored = same(value).stored
        if stored is None or math.prod(stored.shape) > 64 or len(stored.shape) > 1:
            return None
        return [int(each) for each in self.read(stored).reshape(-1).tolist()]


def _at(branch: Sequence[Value], made: Made, output: Value) -> Sequence[Value]:
    """What a branch of an If gives for one of its outputs."""
    at = next((at for at, each in enumerate(made.outputs) if each is output), len(branch))
    return branch[at : at + 1]
