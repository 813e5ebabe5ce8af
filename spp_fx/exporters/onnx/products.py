"""Every product of a graph with a constant factor: which weight that is, and along which dimension it sums."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from spp_fx.errors import FormatError
from spp_fx.exporters.onnx.constants import Flow, State, Unfoldable, chain_of, fold
from spp_fx.exporters.onnx.graph_values import GraphValues, Node, Stored, Value, reachable, sources_of
from spp_fx.exporters.onnx.operators import FLOATS, FOLLOWED, LOOKUPS, QUANTIZE, SUMS

_NO_SITE = ("lm_head", "wte", "wpe", "word_embeddings")
"""Modules whose matrices are not sites, as are those that begin with embed, in graphs without a manifest."""
_ROUTERS = ("router", "gate")
"""Modules whose matrices are not sites if the largest of their results are chosen."""
_WEIGHT_TYPES = frozenset(
    number
    for name, number in TensorProto.DataType.items()
    if name.startswith(("FLOAT", "BFLOAT"))
    or name in ("DOUBLE", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
)
_MULTIPLIES = ("Mul", "Div", "PRelu")
_INDICES = (TensorProto.BOOL, TensorProto.INT64, TensorProto.STRING)
"""Types of tables and masks, which are never weights."""
_SMALL = 1 << 16
"""Elements up to which a value is computed to find its shape; what is larger is a weight."""


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
_GEMM = (Operand(0, _LEFT, transpose="transA"), Operand(1, _RIGHT, transpose="transB"))
PRODUCTS: Mapping[str, tuple[Operand, ...]] = {
    "MatMul": (Operand(0, _LEFT), Operand(1, _RIGHT)),
    **dict.fromkeys(("Gemm", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm"), _GEMM),
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
        base: the constant, and `axis`, negative, its dimension that the product sums over.
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

    @property
    def tensors(self) -> list[Stored]:
        """The tensors of two dimensions or more whose numbers it has."""
        return [each for each in sources_of(self.base, data_only=True) if len(each.shape) > 1]

    @property
    def name(self) -> str:
        """The name of the tensor that it is, or of its own value."""
        if self.scattered:
            return self.base.name.removesuffix(".canonical")
        return self.tensors[0].name if len(self.tensors) == 1 else self.base.name

    @property
    def scattered(self) -> bool:
        """Whether it is computed from kept values and their positions, as onnx-packed does."""
        base = self.base
        return not isinstance(base, Stored) and any(each.op == "ScatterElements" for each in chain_of(base))


class Factors:
    """All stored tensors of a file by what its products do with them: each weight is in exactly one of four tables.

    Attributes:
        sites: name -> the factor that it is.
        refused: factors of products that cannot be read, each with the reason.
        left_out: matrices that no product sums over, embeddings, and by their names heads and routers.
        unread: all other weights.
    """

    def __init__(self, values: GraphValues) -> None:
        self.values = values
        self.file = values.file
        self.sites: dict[str, Factor] = {}
        self.refused: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.flow = Flow(values)
        self._uses = _Uses(values, self.flow)
        self._found: dict[tuple[Any, ...], tuple[Factor, list[Node]]] = {}
        self._combined: dict[Stored, list[Node]] = {}
        # Reasons by kind: "scale"; "lookup"; "left", no product sums over it; "read", by an operator that is not
        # followed; "combined" with activations before a product; "refused".
        self._reasons: defaultdict[str, dict[Stored, str]] = defaultdict(dict)
        self._walked: defaultdict[str, set[Value]] = defaultdict(set)
        for node in values.nodes:
            self._visit(node)
        for stored, nodes in self._combined.items():
            if reason := self._uses.why_weight(nodes):
                self._reasons["combined"][stored] = reason
        self._account(self._name())

    # What each node does with its constants

    def _visit(self, node: Node) -> None:
        op = node.op
        if op in QUANTIZE:
            self._note("scale", node.inputs[1:], "")
        if self.flow.of_node(node) == State.CONSTANT:
            if not node.standard:
                self._refuse(node, node.inputs, "reads it in a format that is not supported here")
            return
        if op in PRODUCTS:
            self._product(node, PRODUCTS[op])
        elif op == "Einsum":
            self._einsum(node)
        elif op in _CONVOLUTIONS:
            self._convolution(node)
        elif not node.standard:
            aside = _NO_WEIGHT.get(op, ())
            weights = [each for at, each in enumerate(node.inputs) if at not in aside]
            self._refuse(node, weights, "reads it in a format that is not supported here")
            tables = [node.input(at) for at in aside]
            scales = op in ("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4")
            self._note("scale" if scales else "lookup", tables, f"{op} looks up rows of it")
        elif self.flow.looks_up(node):
            self._combine(node, node.inputs[:1])
            self._note("lookup", node.inputs[:1], "its rows are looked up, as those of an embedding are")
        elif op in FOLLOWED:
            if self.flow.of_node(node) == State.ACTIVE:
                what = "combines it with activations element by element"
                self._combine(node, node.data_inputs())
                self._note("left", node.data_inputs(), f"only {op} reads it, which {what}")
        elif op not in ("If", "Shape", "Size", "Constant"):
            self._note("read", node.inputs, f"{node.op} reads it, an operator that is not supported here")

    def _product(self, node: Node, operands: Iterable[Operand]) -> None:
        used: set[int | None] = set()
        for each in operands:
            value, zero = node.input(each.index), node.input(each.zero)
            used |= {each.index, each.zero}
            self._note("scale", [zero], "")
            if value is None:
                continue
            turned = each.transpose is not None and node.number(each.transpose, 0) != 0
            if any(node.number(name, 0) for name in ("transBatchA", "transBatchB")):
                self._refuse(node, [value], "transposes it with its batch")
                continue
            axis = -3 - each.axis if turned else each.axis
            self._operand(node, value, axis, zero, -3 - axis)
        rest = [value for at, value in enumerate(node.inputs) if at not in used]
        self._note("left", rest, f"only {node.op} reads it, as a bias, a state or a scale")

    def _einsum(self, node: Node) -> None:
        equation = node.attributes.get("equation", b"")
        text = equation.decode(errors="replace").replace(" ", "") if isinstance(equation, bytes) else ""
        inputs, arrow, output = text.partition("->")
        terms = inputs.split(",")
        if not arrow:
            output = "".join(each for each in inputs if inputs.count(each) == 1 and each.isalpha())
        for at, value in enumerate(node.inputs):
            if value is None or not self.flow.is_weight(value):
                continue
            term = terms[at] if at < len(terms) else ""
            others = "".join(terms[:at] + terms[at + 1 :])
            summed = [each for each in term if each not in output]
            plain = len(set(term)) == len(term) and term.isalpha() and len(terms) == len(node.inputs)
            if plain and not summed:
                self._note("left", [value], "only Einsum reads it, which sums over none of its dimensions")
            elif plain and len(summed) == 1 and summed[0] in others and len(term) > 1:
                self._operand(node, value, term.index(summed[0]) - len(term), None, None)
            else:
                self._refuse(node, [value], f"sums over it by {text[:80]!r}, which is not a matrix product")

    def _convolution(self, node: Node) -> None:
        index, zero_index = _CONVOLUTIONS[node.op]
        weight, zero = node.input(index), node.input(zero_index)
        self._note("scale", [zero], "")
        self._note("read", node.inputs[:1], f"{node.op} convolves it")
        if weight is None or not self.flow.is_weight(weight):
            return
        shape, groups = self.flow.shape(weight), node.number("group", 1)
        turned = node.op == "ConvTranspose"
        if shape is not None and len(shape) > 2 and not turned and shape[1] == 1 and groups > 1:
            self._note(
                "left",
                [weight],
                f"{node.op} convolves each channel by itself and sums over no dimension of it",
            )
        elif shape is None or len(shape) < 3 or any(size != 1 for size in shape[2:]):
            self._refuse(node, [weight], "has a kernel larger than 1, its weight is not one matrix")
        elif turned and groups != 1:
            self._refuse(node, [weight], "has groups, its weight is not one matrix")
        else:
            self._operand(node, weight, (0 if turned else 1) - len(shape), zero, -len(shape), matrix=True)

    def _operand(
        self,
        node: Node,
        value: Value,
        axis: int,
        zero: Value | None,
        zero_axis: int | None,
        *,
        matrix: bool = False,
    ) -> None:
        state = self.flow.state(value)
        if not self.flow.is_weight(value):
            return
        if zero is not None and self.flow.state(zero) != State.CONSTANT:
            self._refuse(node, [value], "gets its zero point at run time")
            return
        if zero is not None and self._is_zero(zero):
            zero = None
        try:
            bases = [] if zero is not None else list(self.flow.bases(value, axis))
        except Unfoldable as reason:
            bases = []
            if state == State.CARRIES:
                self._refuse(node, [value], f"multiplies by it, but {reason}")
                return
        if not bases and state == State.CARRIES:
            self._refuse(node, [value], "multiplies by it in a form that is known only at run time")
            return
        for base, at, size in bases or [(value, axis, None)]:
            self._factor(node, Factor(base, at, zero, zero_axis, matrix), size)

    def _factor(self, node: Node, factor: Factor, size: int | None) -> None:
        """Keep a factor, unless it is a vector or the dimension that is summed over has size 1."""
        try:
            chain_of(factor.base)
            shape = self.flow.shape(factor.base) or self._computed_shape(factor.base)
        except Unfoldable as reason:
            self._refuse(node, [factor.base], f"multiplies by it, but it {reason}")
            return
        if shape is not None:
            if len(shape) < max(2, -factor.axis):
                return  # a vector
            size = shape[factor.axis]
        if size == 1:
            self._note(
                "left", [factor.base], f"{node.op} sums over a dimension of size 1 of it, an outer product"
            )
            return
        key = factor.base, factor.axis, factor.zero
        self._found.setdefault(key, (factor, []))[1].append(node)

    def _computed_shape(self, value: Value) -> tuple[int, ...] | None:
        """The shape of a value that has to be computed; None if that is much work, which is left for later.

        Raises:
            Unfoldable: it cannot be computed.
        """
        chain_of(value)
        if sum(each.numel for each in sources_of(value)) > _SMALL:
            return None
        try:
            return fold(value, self.file).shape
        except FormatError:
            return None  # reported when the weight is read

    def _is_zero(self, zero: Value) -> bool:
        try:
            return not fold(zero, self.file).any()
        except Unfoldable:
            return False

    def _combine(self, node: Node, values: Iterable[Value | None]) -> None:
        for value in values:
            if value is None or not self.flow.is_weight(value):
                continue
            for stored in sources_of(value, data_only=True):
                if _may_weigh(stored) and node not in (known := self._combined.setdefault(stored, [])):
                    known.append(node)

    # Names and reasons

    def _note(self, kind: str, values: Iterable[Value | None], reason: str) -> None:
        """Record a reason for the tensors that values are computed from; the first of a kind counts."""

        def behind(value: Value) -> list[Value]:
            if value.maker is None or not self.flow.is_weight(value):
                return []
            return value.maker.reads(data_only=kind not in ("read", "scale"))

        for value in reachable(values, behind, self._walked[kind]):
            if isinstance(value, Stored):
                self._reasons[kind].setdefault(value, reason)

    def _refuse(self, node: Node, values: Iterable[Value | None], what: str) -> None:
        advice = "" if node.standard else "; verify the model before it was quantised or optimised"
        for value in values:
            if value is None or not self.flow.is_weight(value) or value in self._walked["refused"]:
                continue
            reason = f"{node.label} {what}{advice}"
            self._note("refused", [value], reason)
            if not isinstance(value, Stored) and self.flow.state(value) == State.CONSTANT:
                self._refuse_computed(value, reason)

    def _refuse_computed(self, value: Value, reason: str) -> None:
        """Refuse a matrix under its own name if none of the tensors that it is computed from is one."""
        sources = sources_of(value)
        if any(map(_may_weigh, sources)) or all(each.numel <= 1 for each in sources):
            return
        try:
            shape = self._computed_shape(value)
        except Unfoldable:
            shape = None
        if shape is None or _is_matrix(shape):
            self.refused.setdefault(value.name, reason)

    def _name(self) -> dict[str, list[Node]]:
        """Give each factor the name of the tensor that it is, or of its own value; returns its products."""
        named: dict[str, list[Node]] = {}
        found = sorted(self._found.values(), key=lambda each: not isinstance(each[0].base, Stored))
        for factor, products in found:
            name, node = factor.name, products[0]
            if name in self.sites:
                name = f"{name}/{node.outputs[0].name if node.outputs else node.label}"
            while name in self.sites:
                name += "'"
            self.sites[name] = factor
            named[name] = products
        return named

    def _account(self, products: Mapping[str, list[Node]]) -> None:
        reasons = self._reasons
        unread, left = reasons["read"] | reasons["combined"], reasons["left"] | reasons["lookup"]
        self.refused |= {each.name: reason for each, reason in reasons["refused"].items() if _may_weigh(each)}
        for name in self.refused:
            self.sites.pop(name, None)
        explained = set(reasons["scale"]) - reasons["read"].keys()
        for name, factor in list(self.sites.items()):
            data = set(sources_of(factor.base, data_only=True))
            explained |= {each for each in sources_of(factor.base) if each not in unread}
            known = all(each.data_type in FLOATS for each in data) or not data.isdisjoint(reasons["lookup"])
            routes = _module(name) in _ROUTERS and all(map(self._uses.chooses, products[name]))
            kept_sparse = name in self.file.sparse or factor.scattered
            if (_is_no_site(name) or routes) and not kept_sparse and known:
                self.left_out[name] = "its name is that of a head, an embedding or a router"
                del self.sites[name]
        done = self.sites.keys() | self.refused.keys() | self.left_out.keys()
        for name, stored in self.values.stored.items():
            if name in done or stored in explained or not _is_matrix(stored.shape):
                continue
            if stored.data_type not in _WEIGHT_TYPES:
                continue
            if stored in left and stored not in unread:
                self.left_out[name] = left[stored]
            else:
                self.unread[name] = unread.get(stored, "no product of the graph reads it")


class _Uses:
    """Which nodes the numbers of a value reach."""

    def __init__(self, values: GraphValues, flow: Flow) -> None:
        self.flow = flow
        self._readers = values.readers

    def _after(self, value: Value) -> Iterator[tuple[Node, list[Value]]]:
        """The readers of a value, each with the results that contain the value's numbers."""
        for node in self._readers.get(value, ()):
            results: list[Value] = []
            if node.op == "If":
                results = [each for each in node.outputs if value in node.branch_values(each)]
            elif node.op in FOLLOWED and value in node.data_inputs():
                results = node.outputs
            yield node, results

    def _reached(self, starts: Iterable[Value]) -> dict[Value, None]:
        """The values that contain numbers of others."""

        def after(value: Value) -> list[Value]:
            return [each for _, results in self._after(value) for each in results]

        return dict.fromkeys(reachable(starts, after))

    def chooses(self, node: Node) -> bool:
        """Whether the largest or smallest of a product's results are chosen."""
        reached = self._reached(node.outputs)
        return any(
            reader.op in ("TopK", "ArgMax", "ArgMin") for each in reached for reader, _ in self._after(each)
        )

    def why_weight(self, nodes: Sequence[Node]) -> str | None:
        """Why a matrix that nodes combine with activations may be the weight of a product; None if it is not.

        A product that has it in both operands (rotary tables in queries and keys) does not use it as a weight,
        nor does one that has it on its left alone (positions that are added to what is multiplied next).
        """
        reached = self._reached(output for node in nodes for output in node.outputs)
        for value in reached:
            for node in self._readers.get(value, ()):
                if self._weighs(node, reached):
                    return f"{nodes[0].op} combines it with activations before {node.label} multiplies by it"
        terms = [each for node in nodes if node.op in _MULTIPLIES for each in node.outputs]
        direct = [each for node in nodes if self._is_kept(node) for each in node.outputs]
        for value in reachable(direct, self._directly_after):  # multiplied only later
            for node in self._readers.get(value, ()):
                others = [each for each in node.inputs if each and each not in reached]
                if node.op in _MULTIPLIES and any(self.flow.state(each) == State.ACTIVE for each in others):
                    terms += node.outputs
        for value in self._reached(terms):
            for node in self._readers.get(value, ()):
                if self._adds_up(node, value):
                    return f"activations are multiplied with it and {node.label} sums over the result"
        return None

    def _weighs(self, node: Node, reached: Container[Value | None]) -> bool:
        """Whether a product's weight is among the values, and its left operand is not."""
        if node.op in _CONVOLUTIONS:
            weights: Sequence[int] = (_CONVOLUTIONS[node.op][0],)
        elif node.op == "Einsum":
            weights = range(1, len(node.inputs))
        else:
            weights = [each.index for each in PRODUCTS.get(node.op, ()) if each.index]
        inside = [each in reached for each in node.inputs]
        return any(inside[at] for at in weights if at < len(inside)) and not inside[0]

    def _adds_up(self, node: Node, value: Value) -> bool:
        """Whether a node sums over a value: a reduction, or a product with a constant number or vector."""
        if node.op in SUMS:
            return value in node.data_inputs()[:1]
        if node.op in ("Loop", "Scan"):
            return True  # their bodies are not followed
        if node.op not in ("MatMul", "Gemm", "Einsum", "com.microsoft.FusedMatMul"):
            return False
        others = [each for each in node.inputs[:2] if each and each is not value]
        if not others:
            return node.op == "Einsum"
        shapes = [self.flow.shape(each) for each in others if self.flow.is_weight(each)]
        return any(shape is not None and not _is_matrix(shape) for shape in shapes)

    def _is_kept(self, node: Node) -> bool:
        """Whether a node's results are still the matrix: joined to something, or all its rows in a fixed order."""
        if node.op == "Concat":
            return True
        return node.op in LOOKUPS and len(node.inputs) > 1 and not _depends_on_inputs(node.inputs[1])

    def _directly_after(self, value: Value) -> list[Value]:
        """What a value becomes when it is moved, or changed elementwise without activations."""
        found: list[Value] = []
        for node, results in self._after(value):
            others = [each for each in node.data_inputs() if each and each is not value]
            if node.op == "Concat" or all(self.flow.state(each) != State.ACTIVE for each in others):
                found += results
        return found


def _depends_on_inputs(index: Value | None) -> bool:
    """Whether an index depends on inputs of the graph, as tokens do, and not on shapes alone."""

    def behind(value: Value) -> list[Value | None]:
        return value.maker.inputs if value.maker and value.maker.op not in ("Shape", "Size") else []

    return any(each.maker is None and not isinstance(each, Stored) for each in reachable([index], behind))


def _is_no_site(name: str) -> bool:
    """Whether a matrix's own module is named like an embedding or a head."""
    return _module(name) in _NO_SITE or _module(name).startswith("embed")


def _module(name: str) -> str:
    """The last module of a name."""
    words = name.split(".")
    return words[-2] if len(words) > 1 and words[-1] == "weight" else words[-1]


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size not in (0, 1) for size in shape) > 1


def _may_weigh(stored: Stored) -> bool:
    return _is_matrix(stored.shape) and stored.data_type not in _INDICES
