"""Every product of a graph that has a constant factor: which weight that is, and along which dimension it sums."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from spp_fx.errors import FormatError
from spp_fx.exporters.onnx.flow import ELEMENTWISE, FLOATS, LOOKUPS, MOVED, Flow, State
from spp_fx.exporters.onnx.fold import QUANTIZE, Unfoldable, chain_of, data_of, fold, sources_of
from spp_fx.exporters.onnx.reader import OnnxFile
from spp_fx.exporters.onnx.unpack import Unpacked, unpack
from spp_fx.exporters.onnx.values import Made, Stored, Value, Values, same

Array = npt.NDArray[Any]

NO_SITE = ("lm_head", "wte", "wpe", "word_embeddings")
"""Modules whose matrices are not sites, beside those that begin with embed, for graphs without a manifest."""
_ROUTERS = ("router", "gate")
"""Modules whose matrices are not sites where the largest of their results are chosen."""
_WEIGHT_TYPES = frozenset(
    number
    for name, number in TensorProto.DataType.items()
    if name.startswith(("FLOAT", "BFLOAT"))
    or name in ("DOUBLE", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
)
_FOLLOWED = ELEMENTWISE | MOVED | frozenset(LOOKUPS)
_MULTIPLIES = ("Mul", "Div", "PRelu")
_SUMS = frozenset({
    "AveragePool", "CumSum", "GlobalAveragePool", "GlobalLpPool", "LpPool", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare",
})  # fmt: skip
_INDICES = (TensorProto.BOOL, TensorProto.INT64, TensorProto.STRING)
"""Types of tables and masks, which are not weights whatever reads them."""
_SMALL = 1 << 16
"""Elements up to which a value is computed to learn its shape; what is larger is a weight."""


@dataclass(frozen=True)
class Operand:
    """An input of a product.

    Attributes:
        index: which input.
        axis: the dimension that the product sums over.
        zero: which input is its zero point.
        transpose: the attribute that swaps its dimensions first.
    """

    index: int
    axis: int
    zero: int | None = None
    transpose: str | None = None


_LEFT, _RIGHT = -1, -2
PRODUCTS: Mapping[str, tuple[Operand, ...]] = {
    "MatMul": (Operand(0, _LEFT), Operand(1, _RIGHT)),
    "Gemm": (Operand(0, _LEFT, transpose="transA"), Operand(1, _RIGHT, transpose="transB")),
    "MatMulInteger": (Operand(0, _LEFT, 2), Operand(1, _RIGHT, 3)),
    "QLinearMatMul": (Operand(0, _LEFT, 2), Operand(3, _RIGHT, 5)),
    **dict.fromkeys(("RNN", "LSTM", "GRU"), (Operand(1, -1), Operand(2, -1))),
    "com.microsoft.QGemm": (Operand(0, _LEFT, 2, "transA"), Operand(3, _RIGHT, 5, "transB")),
    "com.microsoft.DynamicQuantizeMatMul": (Operand(0, _LEFT), Operand(1, _RIGHT, 3)),
    "com.microsoft.MatMulIntegerToFloat": (Operand(0, _LEFT, 4), Operand(1, _RIGHT, 5)),
}
_CONVOLUTIONS = {"Conv": (1, None), "ConvTranspose": (1, None), "ConvInteger": (1, 3), "QLinearConv": (3, 5)}
"""Where the weight of a convolution is, and its zero point."""
_NO_WEIGHT: Mapping[str, tuple[int, ...]] = {
    "com.microsoft.MatMulNBits": (2, 3, 4, 5),
    "com.microsoft.MatMulBnb4": (2,),
    "com.microsoft.RotaryEmbedding": (2, 3),
    "com.microsoft.GroupQueryAttention": (7, 8),
    "com.microsoft.EmbedLayerNormalization": (2, 3, 4),
    "com.microsoft.GatherBlockQuantized": (0, 2, 3),
}
"""Inputs of onnxruntime's own operators that are scales, tables of positions or embeddings."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A weight as one product reads it.

    Attributes:
        base: the value that is looked at, and `axis`, negative, its dimension that the product sums over.
        zero: the value that stands for zero; of one dimension, it lies along `zero_axis`.
        matrix: all other dimensions are rows of one matrix.
    """

    base: Value
    axis: int
    zero: Value | None = None
    zero_axis: int | None = None
    matrix: bool = False

    @property
    def transposed(self) -> bool:
        """Whether its last two dimensions are (in, out)."""
        return self.axis == -2 and not self.matrix


@dataclass
class Factors:
    """All stored tensors of a file by what its products do with them: each weight is in one of the four.

    Attributes:
        sites: name -> the factor that it is.
        refused: factors of products that cannot be looked at, each with the reason.
        left_out: matrices that no product sums over, embeddings, and by their names heads and routers.
        unread: whatever else holds weights.
    """

    file: OnnxFile
    unpacked: Mapping[str, Unpacked]
    sites: dict[str, Factor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    _found: dict[tuple[Any, ...], tuple[Factor, list[Made]]] = field(default_factory=dict)
    _products: dict[str, list[Made]] = field(default_factory=dict)
    _combined: dict[Stored, list[Made]] = field(default_factory=dict)
    _reasons: dict[str, dict[Stored, str]] = field(default_factory=dict)
    _walked: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = Values(self.file, self.unpacked)
        self.flow = Flow(self.values.nodes, self._stored)
        self._readers = self._all_readers()
        for made in self.values.nodes:
            self._visit(made)
        for stored, nodes in self._combined.items():
            if reason := self._summed(nodes):
                self._reasons.setdefault("combined", {})[stored] = reason
        self._name()
        self._account()

    def read(self, name: str) -> Array:
        """The numbers of a site, (out, in), or with `transposed` (in, out); of three dimensions for a stack.

        Raises:
            FormatError: they cannot be read or computed.
        """
        factor = self.sites[name]
        try:
            array = fold(factor.base, self._stored)
            if factor.zero is not None:
                array = self._shifted(array, factor, fold(factor.zero, self._stored))
        except Unfoldable as reason:
            raise FormatError(f"{name} ({self.file.path}): {reason}") from reason
        if array.ndim < -factor.axis or array.ndim < 2:
            raise FormatError(
                f"{name} ({self.file.path}): has shape {list(array.shape)}, a product wants a matrix of it"
            )
        if factor.transposed and array.ndim <= 3:
            return array
        array = np.moveaxis(array, factor.axis, -1)
        if factor.matrix:
            array = array.reshape(-1, array.shape[-1])
        while array.ndim > 3 and 1 in array.shape[:-2]:
            array = array.squeeze(array.shape.index(1))
        if array.ndim > 3:
            array = array.reshape(-1, *array.shape[-2:])
        return array.swapaxes(-1, -2) if factor.transposed else array

    def stored_of(self, name: str) -> Stored | None:
        """The tensor of the file that holds most of a site."""
        found = sorted(sources_of(self.sites[name].base), key=lambda each: math.prod(each.shape))
        return found[-1] if found else None

    def tensors_of(self, name: str) -> frozenset[str]:
        """The names of the tensors whose numbers a site has; its own name where there are none."""
        data = sources_of(self.sites[name].base, data_only=True)
        return frozenset(each.name for each in data if len(each.shape) > 1) or frozenset({name})

    def _stored(self, stored: Stored) -> Array:
        if stored.holds is None:
            return unpack(self.file, self.unpacked[stored.name])
        return self.file.read_stored(stored.name, stored.holds)

    def _shifted(self, array: Array, factor: Factor, zero: Array) -> Array:
        """Quantised numbers less what stands for zero among them."""
        if zero.ndim == 1 and zero.size > 1 and factor.zero_axis is not None:
            shape = [1] * array.ndim
            shape[factor.zero_axis] = zero.size
            zero = zero.reshape(shape)
        elif zero.size == 1:
            zero = zero.reshape(())
        try:
            if np.broadcast_shapes(array.shape, zero.shape) == array.shape:
                return array.astype(np.int32) - zero.astype(np.int32)
        except (ValueError, IndexError):
            pass
        raise Unfoldable(f"its zero point of shape {list(zero.shape)} does not fit {list(array.shape)}")

    # What each node does with its constants

    def _visit(self, made: Made) -> None:
        op = QUANTIZE.get(made.op) or made.op
        if op in ("DequantizeLinear", "QuantizeLinear"):
            self._note("scale", made.inputs[1:], "")
        if self.flow.of_node(made) == State.CONSTANT:
            if not made.standard and op == made.op:
                self._refuse(made, made.inputs, "reads it in a form that is not known here")
            return
        if op in PRODUCTS:
            self._product(made, PRODUCTS[op])
        elif op in ("com.microsoft.FusedMatMul", "com.microsoft.FusedGemm"):
            self._product(made, PRODUCTS["Gemm"])
        elif op == "Einsum":
            self._einsum(made)
        elif op in _CONVOLUTIONS:
            self._convolution(made)
        elif not made.standard and op == made.op:
            aside = _NO_WEIGHT.get(op, ())
            weights = [each for at, each in enumerate(made.inputs) if at not in aside]
            self._refuse(made, weights, "reads it in a form that is not known here")
            tables = [made.inputs[at] for at in aside if at < len(made.inputs)]
            scales = op in ("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4")
            self._note("scale" if scales else "lookup", tables, f"{op} looks up rows of it")
        elif op in LOOKUPS and self.flow.looks_up(made):
            self._combine(made, made.inputs[:1])
            self._note("lookup", made.inputs[:1], "its rows are looked up, as those of an embedding are")
        elif op in LOOKUPS or op in ELEMENTWISE or op in MOVED:
            if self.flow.of_node(made) == State.ACTIVE:
                what = "combines it with activations element by element"
                self._combine(made, data_of(made))
                self._note("left", data_of(made), f"only {made.op} reads it, which {what}")
        elif op not in ("If", "Shape", "Size", "Constant"):
            self._note("read", made.inputs, f"{made.op} reads it, which is not followed")

    def _product(self, made: Made, operands: Iterable[Operand]) -> None:
        used: set[int] = set()
        for each in operands:
            value = made.inputs[each.index] if each.index < len(made.inputs) else None
            zero = made.inputs[each.zero] if each.zero is not None and each.zero < len(made.inputs) else None
            used |= {each.index} | ({each.zero} if each.zero is not None else set())
            self._note("scale", [zero], "")
            if value is None:
                continue
            turned = each.transpose is not None and made.number(each.transpose, 0) != 0
            if any(made.number(name, 0) for name in ("transBatchA", "transBatchB")):
                self._refuse(made, [value], "transposes it with its batch")
                continue
            axis = -3 - each.axis if turned else each.axis
            self._operand(made, value, axis, zero, -3 - axis)
        rest = [value for at, value in enumerate(made.inputs) if at not in used]
        self._note("left", rest, f"only {made.op} reads it, as a bias, a state or a scale")

    def _einsum(self, made: Made) -> None:
        equation = made.attribute("equation", b"")
        text = equation.decode(errors="replace").replace(" ", "") if isinstance(equation, bytes) else ""
        inputs, arrow, output = text.partition("->")
        terms = inputs.split(",")
        if not arrow:
            output = "".join(
                sorted(each for each in set(inputs) if inputs.count(each) == 1 and each.isalpha())
            )
        for at, value in enumerate(made.inputs):
            if value is None or not self.flow.is_weight(value):
                continue
            term = terms[at] if at < len(terms) else ""
            others = "".join(terms[:at] + terms[at + 1 :])
            summed = [each for each in term if each not in output]
            plain = len(set(term)) == len(term) and term.isalpha() and len(terms) == len(made.inputs)
            if plain and not summed:
                self._note("left", [value], "only Einsum reads it, which sums over none of its dimensions")
            elif plain and len(summed) == 1 and summed[0] in others and len(term) > 1:
                self._operand(made, value, term.index(summed[0]) - len(term), None, None)
            else:
                self._refuse(
                    made, [value], f"sums over it as {text[:80]!r} says, which is not one plain product"
                )

    def _convolution(self, made: Made) -> None:
        index, zero_index = _CONVOLUTIONS[made.op]
        weight = made.inputs[index] if index < len(made.inputs) else None
        zero = made.inputs[zero_index] if zero_index and zero_index < len(made.inputs) else None
        self._note("scale", [zero], "")
        self._note("read", made.inputs[:1], f"{made.op} reads it as what it convolves")
        if weight is None or self.flow.state(weight) not in (State.CONSTANT, State.CARRIES):
            return
        shape, groups = self.flow.shape(weight), made.number("group", 1)
        turned = made.op == "ConvTranspose"
        if shape is not None and len(shape) > 2 and not turned and shape[1] == 1 and groups > 1:
            self._note(
                "left", [weight], f"{made.op} convolves each channel by itself, it sums over none of them"
            )
        elif shape is None or len(shape) < 3 or any(size != 1 for size in shape[2:]):
            self._refuse(made, [weight], "has a kernel larger than 1, its weight is not one matrix")
        elif turned and groups != 1:
            self._refuse(made, [weight], "has groups, its weight is not one matrix")
        else:
            self._operand(made, weight, (0 if turned else 1) - len(shape), zero, -len(shape), matrix=True)

    def _operand(
        self,
        made: Made,
        value: Value,
        axis: int,
        zero: Value | None,
        zero_axis: int | None,
        *,
        matrix: bool = False,
    ) -> None:
        state = self.flow.state(value)
        if state not in (State.CONSTANT, State.CARRIES):
            return
        if zero is not None and self.flow.state(zero) != State.CONSTANT:
            self._refuse(made, [value], "takes its zero point when it runs")
            return
        if zero is not None and self._is_zero(zero):
            zero = None
        try:
            bases = [] if zero is not None else list(self.flow.bases(value, axis))
        except Unfoldable as reason:
            bases = []
            if state == State.CARRIES:
                self._refuse(made, [value], f"multiplies by it, but {reason}")
                return
        if not bases and state == State.CARRIES:
            self._refuse(made, [value], "multiplies by it in a form that only the run decides")
            return
        for base, at, size in bases or [(same(value), axis, None)]:
            self._factor(made, Factor(base, at, zero, zero_axis, matrix), size)

    def _factor(self, made: Made, factor: Factor, size: int | None) -> None:
        """Keep a factor, unless it is a vector, or what it sums over is one number."""
        try:
            chain_of(factor.base)
            shape = self.flow.shape(factor.base) or self._computed_shape(factor.base)
        except Unfoldable as reason:
            self._refuse(made, [factor.base], f"multiplies by it, but it {reason}")
            return
        if shape is not None:
            if len(shape) < max(2, -factor.axis):
                return  # a vector
            size = shape[factor.axis]
        if size == 1:
            self._note(
                "left", [factor.base], f"{made.op} sums over a dimension of size 1 of it, an outer product"
            )
            return
        key = (id(factor.base), factor.axis, factor.zero and id(same(factor.zero)))
        stored = factor.base.stored
        if stored is not None:  # the same tensor has one value at each call of a function
            key = (stored, *key[1:])
        self._found.setdefault(key, (factor, []))[1].append(made)

    def _computed_shape(self, value: Value) -> tuple[int, ...] | None:
        """The shape of a value that has to be computed; None where that is much work, which it is left for later.

        Raises:
            Unfoldable: it cannot be computed.
        """
        chain_of(value)
        if sum(max(0, math.prod(each.shape)) for each in sources_of(value)) > _SMALL:
            return None
        try:
            return fold(value, self._stored).shape
        except FormatError:
            return None  # is told when it is looked at

    def _is_zero(self, zero: Value) -> bool:
        try:
            return not fold(zero, self._stored).any()
        except Unfoldable:
            return False

    # What becomes of a matrix that is combined with activations

    def _all_readers(self) -> dict[int, list[Made]]:
        """The nodes that read each value, by the id of the value."""
        readers: dict[int, list[Made]] = {}
        for made in self.values.nodes:
            given = [*made.inputs, *(each for branch in made.branches for each in branch)]
            for value in {id(same(each)): each for each in given if each is not None}:
                readers.setdefault(value, []).append(made)
        return readers

    def _combine(self, made: Made, values: Iterable[Value | None]) -> None:
        for value in values:
            if value is None or not self.flow.is_weight(value):
                continue
            for stored in sources_of(value, data_only=True):
                if _may_weigh(stored) and made not in (known := self._combined.setdefault(stored, [])):
                    known.append(made)

    def _after(self, value: Value) -> Iterator[tuple[Made, list[Value]]]:
        """The readers of a value, each with its results that have the value's numbers in them."""
        for made in self._readers.get(id(same(value)), ()):
            op = QUANTIZE.get(made.op) or made.op
            results: list[Value] = []
            if op == "If":
                for branch in made.branches:
                    pairs = zip(made.outputs, branch, strict=False)
                    results += [output for output, each in pairs if same(each) is same(value)]
            elif op in _FOLLOWED and any(
                each is not None and same(each) is same(value) for each in data_of(made)
            ):
                results = made.outputs
            yield made, results

    def _reached(self, starts: Iterable[Value]) -> dict[int, Value]:
        """The values that have numbers of others in them, through elementwise and moving operators."""
        reached: dict[int, Value] = {}
        stack = [same(each) for each in starts]
        while stack:
            value = stack.pop()
            if id(value) not in reached:
                reached[id(value)] = value
                stack += [same(each) for _, results in self._after(value) for each in results]
        return reached

    def _chooses(self, made: Made) -> bool:
        """Whether the largest or smallest of a product's results are chosen."""
        reached = self._reached(made.outputs).values()
        return any(
            reader.op in ("TopK", "ArgMax", "ArgMin") for each in reached for reader, _ in self._after(each)
        )

    def _summed(self, nodes: Sequence[Made]) -> str | None:
        """Why a matrix that nodes combine with activations may be the weight of a product; None if it is not.

        A product that has it in both operands (rotary tables in queries and keys) does not use it as a weight,
        nor does one that has it on its left alone (positions that are added to what is multiplied next).
        """
        reached = self._reached(output for made in nodes for output in made.outputs)
        for value in reached.values():
            for made, _ in self._after(value):
                if self._weighs(made, reached):
                    return f"{nodes[0].op} combines it with activations before {made.label} multiplies by it"
        terms = [each for made in nodes if made.op in _MULTIPLIES for each in made.outputs]
        direct = [each for made in nodes if self._is_kept(made) for each in made.outputs]
        for value in self._direct(direct).values():  # multiplied only later
            for made, _ in self._after(value):
                others = [each for each in made.inputs if each and id(same(each)) not in reached]
                if made.op in _MULTIPLIES and any(self.flow.state(each) == State.ACTIVE for each in others):
                    terms += made.outputs
        for value in self._reached(terms).values():
            for made, _ in self._after(value):
                if self._adds_up(made, value):
                    return f"activations are multiplied with it and {made.label} sums over the result"
        return None

    def _weighs(self, made: Made, reached: Mapping[int, Value]) -> bool:
        """Whether a product's weight is among the values, and what it multiplies is not."""
        op = "Gemm" if made.op in ("com.microsoft.FusedMatMul", "com.microsoft.FusedGemm") else made.op
        if op in _CONVOLUTIONS:
            places: Sequence[int] = (_CONVOLUTIONS[op][0],)
        elif op == "Einsum":
            places = range(1, len(made.inputs))
        else:
            places = [each.index for each in PRODUCTS.get(op, ()) if each.index]
        inside = [each is not None and id(same(each)) in reached for each in made.inputs]
        return any(inside[at] for at in places if at < len(inside)) and not inside[0]

    def _adds_up(self, made: Made, value: Value) -> bool:
        """Whether a node sums over a value: a reduction, or a product with one number or a vector of constants."""
        if made.op in _SUMS:
            return any(each is not None and same(each) is value for each in data_of(made)[:1])
        if made.op == "Loop" or made.op == "Scan":
            return True  # what their bodies do with it is not followed
        if made.op not in ("MatMul", "Gemm", "Einsum", "com.microsoft.FusedMatMul"):
            return False
        others = [each for each in made.inputs[:2] if each is not None and same(each) is not value]
        if not others:
            return made.op == "Einsum"
        shapes = [self.flow.shape(each) for each in others if self.flow.is_weight(each)]
        return any(shape is not None and not _is_matrix(shape) for shape in shapes)

    def _is_kept(self, made: Made) -> bool:
        """Whether a node's results are still the matrix: joined to something, or all rows in a counted order."""
        if made.op == "Concat":
            return True
        return made.op in LOOKUPS and len(made.inputs) > 1 and not self._is_given(made.inputs[1])

    def _is_given(self, index: Value | None) -> bool:
        """Whether an index comes of what the graph is given, as tokens do, and not of shapes alone."""
        seen: set[int] = set()
        stack = [index]
        while stack:
            value = stack.pop()
            if value is None or id(value := same(value)) in seen or value.stored is not None:
                continue
            seen.add(id(value))
            if value.maker is None:
                return True
            if value.maker.op not in ("Shape", "Size"):
                stack += value.maker.inputs
        return False

    def _direct(self, starts: Iterable[Value]) -> dict[int, Value]:
        """The values that are others moved, or changed number by number without activations."""
        found: dict[int, Value] = {}
        stack = [same(each) for each in starts]
        while stack:
            value = stack.pop()
            if id(value) in found:
                continue
            found[id(value)] = value
            for made, results in self._after(value):
                others = [each for each in data_of(made) if each is not None and same(each) is not value]
                if made.op == "Concat" or all(self.flow.state(each) != State.ACTIVE for each in others):
                    stack += [same(each) for each in results]
        return found

    # Names and reasons

    def _note(self, kind: str, values: Iterable[Value | None], reason: str) -> None:
        """Keep for the tensors behind values what is done with them; the first reason of a kind counts."""
        walked = self._walked.setdefault(kind, set())
        reasons = self._reasons.setdefault(kind, {})
        stack = [same(each) for each in values if each is not None]
        while stack:
            value = stack.pop()
            if id(value) in walked:
                continue
            walked.add(id(value))
            if value.stored is not None:
                reasons.setdefault(value.stored, reason)
            elif value.maker is not None and self.flow.is_weight(value):
                whole = kind in ("read", "scale")
                inputs = value.maker.inputs if whole else data_of(value.maker)
                stack += [same(each) for each in inputs if each is not None]
                stack += [same(each) for branch in value.maker.branches for each in branch]

    def _refuse(self, made: Made, values: Iterable[Value | None], what: str) -> None:
        advice = "" if made.standard else "; verify the model before it was quantised or optimised"
        for value in values:
            if value is None or not self.flow.is_weight(value):
                continue
            if id(same(value)) in self._walked.get("refused", ()):
                continue
            reason = f"{made.label} {what}{advice}"
            self._note("refused", [value], reason)
            if same(value).stored is None and self.flow.state(value) == State.CONSTANT:
                self._refuse_computed(value, reason)

    def _refuse_computed(self, value: Value, reason: str) -> None:
        """Refuse a matrix under its own name where none of the tensors that it is computed of is one."""
        sources = list(sources_of(value))
        if any(_may_weigh(each) for each in sources) or all(math.prod(each.shape) <= 1 for each in sources):
            return
        try:
            shape = self._computed_shape(value)
        except Unfoldable:
            shape = None
        if shape is None or _is_matrix(shape):
            self.refused.setdefault(same(value).name, reason)

    def _name(self) -> None:
        """Give each factor the name of the tensor that it is, or of its own value."""
        found = sorted(self._found.values(), key=lambda each: each[0].base.stored is None)
        for factor, products in found:
            base, made = factor.base, products[0]
            matrices = {each for each in sources_of(base, data_only=True) if len(each.shape) > 1}
            name = next(iter(matrices)).name if len(matrices) == 1 else base.name
            if name in self.sites:
                name = f"{name}/{made.outputs[0].name if made.outputs else made.label}"
            while name in self.sites:
                name += "'"
            self.sites[name] = factor
            self._products[name] = products

    def _account(self) -> None:
        """Each weight is in one of the four."""
        refused, read = self._reasons.get("refused", {}), self._reasons.get("read", {})
        unread = read | self._reasons.get("combined", {})
        lookup = self._reasons.get("lookup", {})
        left = self._reasons.get("left", {}) | lookup
        part = {each for chain in self.unpacked.values() for each in (chain.values, chain.codes, chain.table)}
        # Its own chain says nothing of a part: what is said comes from another reader.
        part -= {each.name for each in (*refused, *unread, *left)}
        for stored, reason in refused.items():
            if _may_weigh(stored):
                self.refused[stored.name] = reason
        for name in self.refused:
            self.sites.pop(name, None)
        explained = set(self._reasons.get("scale", {})) - read.keys()
        for name, factor in list(self.sites.items()):
            sources, data = set(sources_of(factor.base)), set(sources_of(factor.base, data_only=True))
            explained |= sources
            stored = factor.base.stored
            kept_sparse = stored is not None and (stored.holds is None or name in self.file.sparse)
            known = all(each.data_type in FLOATS for each in data) or not data.isdisjoint(lookup)
            routes = _module(name) in _ROUTERS and all(map(self._chooses, self._products[name]))
            if (is_no_site(name) or routes) and not kept_sparse and known:
                self.left_out[name] = "its name is that of a head, an embedding or a router"
                del self.sites[name]
        done = self.sites.keys() | self.refused.keys() | self.left_out.keys() | part
        for stored in self.values.stored.values():
            name = stored.name
            if name in done or stored in explained or not _is_matrix(stored.shape):
                continue
            if stored.data_type not in _WEIGHT_TYPES:
                continue
            if stored in left and stored not in unread:
                self.left_out[name] = left[stored]
            else:
                self.unread[name] = unread.get(stored, "no product of the graph reads it")


def is_no_site(name: str) -> bool:
    """Whether a graph's name is that of an embedding or the head: its module's own name, not that of one around it."""
    return _module(name) in NO_SITE or _module(name).startswith("embed")


def _module(name: str) -> str:
    """The last module of a name."""
    words = name.split(".")
    return words[-2] if len(words) > 1 and words[-1] == "weight" else words[-1]


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size not in (0, 1) for size in shape) > 1


def _may_weigh(stored: Stored) -> bool:
    return _is_matrix(stored.shape) and stored.data_type not in _INDICES
