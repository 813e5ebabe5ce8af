"""Every product of an .onnx file with a constant factor is checked, or named with the reason why it is not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from spp_fx.errors import FormatError
from spp_fx.exporters.manifest import Part, TensorRecord, write_manifest
from spp_fx.exporters.onnx.graph_weights import GRAPH, read_graph
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.scan import pack_mask
from spp_fx.sparsity.weights import Weights
from spp_fx.verbs.verify import Check, run_check, verify
from spp_fx.verification.policy import Requirements
from spp_fx.version import VERSION
from tests.effort import examples

K, N = 16, 8
FLOAT = TensorProto.FLOAT


def weight(kind: str, seed: int = 0) -> np.ndarray:
    """(N, K) float32 without a zero, or 2:4 along K."""
    rng = np.random.default_rng(seed)
    found = rng.uniform(0.5, 1, (N, K)) * rng.choice([-1, 1], (N, K))
    if kind == "2:4":
        found.reshape(-1, 4)[:, [0, 3]] = 0
    return found.astype(np.float32)


@dataclass
class Graph:
    """A graph as it grows; the input of every product is x (batch, K)."""

    opset: int = 21
    nodes: list[NodeProto] = field(default_factory=list)
    stored: list[TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def put(self, name: str, array: np.ndarray, data_type: int | None = None) -> str:
        self.stored.append(
            numpy_helper.from_array(array, name)
            if data_type is None
            else helper.make_tensor(name, data_type, array.shape, array.flatten())
        )
        return name

    def op(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def ask(self, name: str, shape: list[Any], data_type: int = FLOAT) -> str:
        if name not in {each.name for each in self.inputs}:
            self.inputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def write(self, path: Path) -> Path:
        self.ask("x", ["b", K])
        outputs = [helper.make_empty_tensor_value_info(name) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outputs, self.stored)
        domains = {"": self.opset, "com.microsoft": 1, "local": 1}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items()],
            functions=self.functions,
            ir_version=10,
        )
        path.write_bytes(model.SerializeToString())
        return path


Piece = Callable[[Graph, str, np.ndarray], None]
"""Put a weight (N, K) into a graph under a name, so that one product sums over its K."""


def plain(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("MatMul", ["x", graph.put(name, w.T.copy())], f"{name}.y")


def gemm(graph: Graph, name: str, w: np.ndarray) -> None:
    bias = graph.put(f"{name}.bias", np.ones(N, np.float32))
    graph.op("Gemm", ["x", graph.put(name, w), bias], f"{name}.y", transB=1)


def left(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("MatMul", [graph.put(name, w), graph.ask("columns", [K, "b"])], f"{name}.y")


def left_gemm(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Gemm", [graph.put(name, w.T.copy()), graph.ask("columns", [K, "b"])], f"{name}.y", transA=1)


def constant_node(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Constant", [], name, value=numpy_helper.from_array(w.T.copy()))
    graph.op("MatMul", ["x", name], f"{name}.y")


def sparse_constant(graph: Graph, name: str, w: np.ndarray) -> None:
    flat = w.T.reshape(-1)
    at = np.flatnonzero(flat)
    value = helper.make_sparse_tensor(
        numpy_helper.from_array(flat[at]), numpy_helper.from_array(at.astype(np.int64)), w.T.shape
    )
    graph.op("Constant", [], name, sparse_value=value)
    graph.op("MatMul", ["x", name], f"{name}.y")


def through(graph: Graph, name: str, w: np.ndarray) -> None:
    turned = graph.op("Transpose", [graph.put(name, w.astype(np.float16))], f"{name}.t")
    cast = graph.op("Cast", [graph.op("Identity", [turned], f"{name}.i")], f"{name}.c", to=FLOAT)
    graph.op("MatMul", ["x", cast], f"{name}.y")


def quantized(w: np.ndarray, zero: int = 3) -> np.ndarray:
    return np.where(w == 0, zero, np.clip(np.rint(w * 100), -120, 120) + zero).astype(np.int8)


def qdq(graph: Graph, name: str, w: np.ndarray) -> None:
    scale = graph.put(f"{name}.scale", np.full(N, 0.01, np.float32))
    zero = graph.put(f"{name}.zero", np.full(N, 3, np.int8))
    wide = graph.op("DequantizeLinear", [graph.put(name, quantized(w)), scale, zero], f"{name}.d", axis=0)
    graph.op("MatMul", ["x", graph.op("Transpose", [wide], f"{name}.t", perm=[1, 0])], f"{name}.y")


def fake_quantized(graph: Graph, name: str, w: np.ndarray) -> None:
    ends = [
        graph.put(f"{name}.scale", np.array(0.01, np.float32)),
        graph.put(f"{name}.zero", np.array(0, np.int8)),
    ]
    narrow = graph.op("QuantizeLinear", [graph.put(name, w.T.copy()), *ends], f"{name}.q")
    graph.op("MatMul", ["x", graph.op("DequantizeLinear", [narrow, *ends], f"{name}.d")], f"{name}.y")


def int4_blocks(graph: Graph, name: str, w: np.ndarray) -> None:
    numbers = np.where(w == 0, 1, np.where(w > 0, 5, -5)).astype(np.int8)
    scale = graph.put(f"{name}.scale", np.full((N, K // 8), 0.1, np.float32))
    zero = graph.put(f"{name}.zero", np.ones((N, K // 8), np.int8), TensorProto.INT4)
    packed = graph.put(name, numbers, TensorProto.INT4)
    wide = graph.op("DequantizeLinear", [packed, scale, zero], f"{name}.d", axis=1, block_size=8)
    graph.op("MatMul", ["x", graph.op("Transpose", [wide], f"{name}.t", perm=[1, 0])], f"{name}.y")


def uint4_by_hand(graph: Graph, name: str, w: np.ndarray) -> None:
    """Two numbers a byte, in one dimension, taken apart by the graph."""
    numbers = np.where(w == 0, 8, np.where(w > 0, 12, 4)).astype(np.uint8).reshape(-1, 2)
    bytes_ = graph.put(name, (numbers[:, :1] | numbers[:, 1:] << 4))
    low = graph.op("BitwiseAnd", [bytes_, graph.put(f"{name}.15", np.array(15, np.uint8))], f"{name}.l")
    four = graph.put(f"{name}.4", np.array(4, np.uint8))
    high = graph.op("BitShift", [bytes_, four], f"{name}.h", direction="RIGHT")
    both = graph.op("Concat", [low, high], f"{name}.b", axis=1)
    shape = graph.put(f"{name}.shape", np.array([N, K]))
    flat = graph.op("Cast", [graph.op("Reshape", [both, shape], f"{name}.r")], f"{name}.f", to=FLOAT)
    shifted = graph.op("Sub", [flat, graph.put(f"{name}.8", np.array(8, np.float32))], f"{name}.s")
    graph.op("MatMul", ["x", graph.op("Transpose", [shifted], f"{name}.t", perm=[1, 0])], f"{name}.y")


def dynamic(graph: Graph, name: str, w: np.ndarray) -> None:
    x = graph.ask("x8", ["b", K], TensorProto.UINT8)
    ends = [graph.put(f"{name}.xz", np.array(7, np.uint8)), graph.put(f"{name}.zero", np.full(N, 3, np.int8))]
    graph.op("MatMulInteger", [x, graph.put(name, quantized(w).T.copy()), *ends], f"{name}.y")


def linear_integers(graph: Graph, name: str, w: np.ndarray) -> None:
    x = graph.ask("x8", ["b", K], TensorProto.UINT8)
    one = graph.put(f"{name}.one", np.array(1, np.float32))
    nothing, zero = (
        graph.put(f"{name}.xz", np.array(0, np.uint8)),
        graph.put(f"{name}.zero", np.array(3, np.int8)),
    )
    packed = graph.put(name, quantized(w).T.copy())
    graph.op("QLinearMatMul", [x, one, nothing, packed, one, zero, one, nothing], f"{name}.y")


def of_a_stack(graph: Graph, name: str, w: np.ndarray) -> None:
    """A matrix of a stack that an input chooses."""
    stack = graph.put(name, np.stack([w, w]))
    chosen = graph.op("Gather", [stack, graph.ask("expert", [], TensorProto.INT64)], f"{name}.g", axis=0)
    graph.op("MatMul", ["x", graph.op("Transpose", [chosen], f"{name}.t", perm=[1, 0])], f"{name}.y")


def expanded(graph: Graph, name: str, w: np.ndarray) -> None:
    shape = graph.ask("three", [3], TensorProto.INT64)
    wide = graph.op("Expand", [graph.put(name, w.T.copy()), shape], f"{name}.e")
    graph.op("MatMul", [graph.ask("x3", ["e", "b", K]), wide], f"{name}.y")


def einsum(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Einsum", ["x", graph.put(name, w)], f"{name}.y", equation="bk, nk -> bn")


def einsum_first(graph: Graph, name: str, w: np.ndarray) -> None:
    """The dimension that is summed over is the first of three."""
    stack = np.ascontiguousarray(np.stack([w, w]).transpose(2, 0, 1))
    graph.op("Einsum", ["x", graph.put(name, stack)], f"{name}.y", equation="bk,ken->ben")


def conv(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Conv", [graph.ask("image", ["b", K, 4, 4]), graph.put(name, w[:, :, None, None])], f"{name}.y")


def lstm(graph: Graph, name: str, w: np.ndarray) -> None:
    """Hidden size 2: W is (1, 8, K), R (1, 8, 2) sparse along nothing that a pattern would want."""
    again = graph.put(f"{name}.again", np.zeros((1, N, 4), np.float32))
    graph.op(
        "RNN",
        [graph.ask("steps", ["t", "b", K]), graph.put(name, w[None]), again],
        f"{name}.y",
        hidden_size=N,
    )


def in_a_branch(graph: Graph, name: str, w: np.ndarray) -> None:
    def branch(label: str, node: NodeProto, stored: list[TensorProto]) -> onnx.GraphProto:
        return helper.make_graph(
            [node], label, [], [helper.make_empty_tensor_value_info(node.output[0])], stored
        )

    inside = numpy_helper.from_array(w.T.copy(), name)
    graph.nodes.append(
        helper.make_node(
            "If",
            [graph.ask("choice", [], TensorProto.BOOL)],
            [f"{name}.y"],
            then_branch=branch("then", helper.make_node("MatMul", ["x", name], [f"{name}.a"]), [inside]),
            else_branch=branch("else", helper.make_node("Identity", ["x"], [f"{name}.b"]), []),
        )
    )


def chosen_by_a_branch(graph: Graph, name: str, w: np.ndarray) -> None:
    """An If gives the weight that a product behind it multiplies by."""

    def branch(label: str, node: NodeProto, stored: list[TensorProto]) -> onnx.GraphProto:
        return helper.make_graph(
            [node], label, [], [helper.make_empty_tensor_value_info(node.output[0])], stored
        )

    inside = numpy_helper.from_array(w.T.copy(), name)
    zeros = helper.make_node(
        "Constant", [], [f"{name}.b"], value=numpy_helper.from_array(np.zeros((K, N), "f4"))
    )
    chosen = helper.make_node(
        "If",
        [graph.ask("choice", [], TensorProto.BOOL)],
        [f"{name}.w"],
        then_branch=branch("then", helper.make_node("Identity", [name], [f"{name}.a"]), [inside]),
        else_branch=branch("else", zeros, []),
    )
    graph.nodes.append(chosen)
    graph.op("MatMul", ["x", f"{name}.w"], f"{name}.y")


def scanned(graph: Graph, name: str, w: np.ndarray) -> None:
    """The body of a Scan takes one matrix of a stack at a time."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", f"{name}.one"], [f"{name}.p"]),
            helper.make_node("Identity", ["s"], ["s2"]),
        ],
        "body",
        [helper.make_empty_tensor_value_info("s"), helper.make_empty_tensor_value_info(f"{name}.one")],
        [helper.make_empty_tensor_value_info("s2"), helper.make_empty_tensor_value_info(f"{name}.p")],
    )
    stack = graph.put(name, np.ascontiguousarray(np.stack([w.T, w.T])))
    graph.nodes.append(
        helper.make_node("Scan", ["x", stack], [f"{name}.s", f"{name}.y"], num_scan_inputs=1, body=body)
    )


def in_a_function(graph: Graph, name: str, w: np.ndarray) -> None:
    """The function holds the weight, and is called twice."""
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(w.T.copy())),
        helper.make_node("MatMul", ["given", name], ["made"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    graph.functions.append(helper.make_function("local", f"Of_{name}", ["given"], ["made"], nodes, opsets))
    for time in "ab":
        graph.op(f"Of_{name}", ["x"], f"{name}.y{time}", domain="local")


def through_functions(graph: Graph, name: str, w: np.ndarray) -> None:
    """A function that turns its input inside one that multiplies by it."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    turn = [helper.make_node("Transpose", ["given"], ["made"], perm=[1, 0])]
    linear = [
        helper.make_node(f"Turn_{name}", ["w"], ["turned"], domain="local"),
        helper.make_node("MatMul", ["v", "turned"], ["made"]),
    ]
    graph.functions.append(
        helper.make_function("local", f"Linear_{name}", ["v", "w"], ["made"], linear, opsets)
    )
    graph.functions.append(helper.make_function("local", f"Turn_{name}", ["given"], ["made"], turn, opsets))
    graph.op(f"Linear_{name}", ["x", graph.put(name, w)], f"{name}.y", domain="local")


READ: dict[str, Piece] = {
    piece.__name__: piece
    for piece in (
        plain, gemm, left, left_gemm, constant_node, sparse_constant, through, qdq, fake_quantized, int4_blocks,
        uint4_by_hand, dynamic, linear_integers, of_a_stack, expanded, einsum, einsum_first, conv, lstm,
        in_a_branch, chosen_by_a_branch, scanned, in_a_function, through_functions,
    )
}  # fmt: skip


def n_bits(graph: Graph, name: str, w: np.ndarray) -> None:
    packed = graph.put(name, np.ones((N, 1, 8), np.uint8))
    scale = graph.put(f"{name}.scale", np.ones((N, 2), np.float32))
    names = {"K": K, "N": N, "bits": 4, "block_size": 16}
    graph.op("MatMulNBits", ["x", packed, scale], f"{name}.y", domain="com.microsoft", **names)


def unknown(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Mystery", ["x", graph.put(name, w)], f"{name}.y", domain="com.example")


def summed_twice(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Einsum", ["x", graph.put(name, w)], f"{name}.y", equation="bk,nk->b")


def kernel(graph: Graph, name: str, w: np.ndarray) -> None:
    kernel = graph.put(name, w.reshape(N, K, 1, 1).repeat(3, axis=2))
    graph.op("Conv", [graph.ask("image", ["b", K, 4, 4]), kernel], f"{name}.y")


def picked_by_element(graph: Graph, name: str, w: np.ndarray) -> None:
    which = graph.ask("mask", [K, N], TensorProto.BOOL)
    zeros = graph.put(f"{name}.none", np.array(0, np.float32))
    chosen = graph.op("Where", [which, graph.put(name, w.T.copy()), zeros], f"{name}.w")
    graph.op("MatMul", ["x", chosen], f"{name}.y")


def scaled_at_run_time(graph: Graph, name: str, w: np.ndarray) -> None:
    wide = graph.op("Cast", [graph.put(name, quantized(w, 0).T.copy())], f"{name}.c", to=FLOAT)
    graph.op("MatMul", ["x", graph.op("Mul", [wide, graph.ask("scale", [])], f"{name}.w")], f"{name}.y")


def not_evaluated(graph: Graph, name: str, w: np.ndarray) -> None:
    inverse = graph.op("Det", [graph.put(name, np.ones((2, N, N), np.float32))], f"{name}.d")
    shape = graph.put(f"{name}.shape", np.array([1, 2]))
    graph.op(
        "MatMul",
        [graph.ask("one", ["b", 1]), graph.op("Reshape", [inverse, shape], f"{name}.r")],
        f"{name}.y",
    )


REFUSED: dict[str, Piece] = {
    piece.__name__: piece
    for piece in (n_bits, unknown, summed_twice, kernel, picked_by_element, scaled_at_run_time, not_evaluated)
}


def looked_up(graph: Graph, name: str, w: np.ndarray) -> None:
    rows = graph.op("Gather", [graph.put(name, w), graph.ask("ids", ["b"], TensorProto.INT64)], f"{name}.g")
    graph.op("MatMul", [rows, graph.ask("columns", [K, "b"])], f"{name}.y")


def added(graph: Graph, name: str, w: np.ndarray) -> None:
    """Positions that activations get, before they are multiplied."""
    sum_ = graph.op("Add", [graph.ask("rows", [N, K]), graph.put(name, w)], f"{name}.s")
    graph.op("MatMul", [sum_, graph.ask("columns", [K, "b"])], f"{name}.y")


def outer(graph: Graph, name: str, w: np.ndarray) -> None:
    """Frequencies by positions, as rotary embeddings are made."""
    graph.op("MatMul", [graph.put(name, w[:, :, None]), graph.ask("row", [1, "b"])], f"{name}.y")


def rotary(graph: Graph, name: str, w: np.ndarray) -> None:
    """Queries and keys times one table, before they are multiplied with each other."""
    table = graph.put(name, w)
    q = graph.op("Mul", [graph.ask("q2", [N, K]), table], f"{name}.q")
    k = graph.op("Mul", [table, graph.ask("k2", [N, K])], f"{name}.k")
    graph.op("MatMul", [q, graph.op("Transpose", [k], f"{name}.t", perm=[1, 0])], f"{name}.y")


def masked(graph: Graph, name: str, w: np.ndarray) -> None:
    scores = graph.op("Add", [graph.ask("scores", [N, K]), graph.put(name, w)], f"{name}.m")
    graph.op("MatMul", [graph.op("Softmax", [scores], f"{name}.p"), graph.ask("v2", [K, "b"])], f"{name}.y")


def normed(graph: Graph, name: str, w: np.ndarray) -> None:
    """The rows of an embedding divided by their own size, twice."""
    rows = graph.op("Gather", [graph.put(name, w), graph.ask("ids", ["b"], TensorProto.INT64)], f"{name}.g")
    for turn in "ab":
        size = graph.op("ReduceL2", [rows], f"{name}.{turn}n")
        rows = graph.op("Div", [rows, size], f"{name}.{turn}d")


def depthwise(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Conv", [graph.ask("line", ["b", N, 40]), graph.put(name, w[:, None, :])], f"{name}.y", group=N)


def head(graph: Graph, name: str, w: np.ndarray) -> None:
    plain(graph, name, w)


LEFT_OUT: dict[str, Piece] = {
    piece.__name__: piece for piece in (looked_up, added, outer, rotary, masked, normed, depthwise, head)
}


def unused(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.put(name, w)


def to_an_unknown_standard_operator(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("Attention", [graph.ask("q", [1, 1, "b", K]), graph.put(name, w[None, None]), "q"], f"{name}.y")


def terms(graph: Graph, name: str, w: np.ndarray) -> str:
    wide = graph.op("Unsqueeze", ["x", graph.put(f"{name}.one", np.array([1]))], f"{name}.u")
    return graph.op("Mul", [wide, graph.put(name, w)], f"{name}.m")


def summed_terms(graph: Graph, name: str, w: np.ndarray) -> None:
    last = graph.put(f"{name}.two", np.array([2]))
    graph.op("ReduceSum", [terms(graph, name, w), last], f"{name}.y", keepdims=0)


def mean_of_moved_terms(graph: Graph, name: str, w: np.ndarray) -> None:
    double = graph.op("Add", [terms(graph, name, w), f"{name}.m"], f"{name}.double")
    turned = graph.op("Transpose", [double], f"{name}.t", perm=[2, 0, 1])
    graph.op("ReduceMean", [turned, graph.put(f"{name}.zero", np.array([0]))], f"{name}.y", keepdims=0)


def terms_times_ones(graph: Graph, name: str, w: np.ndarray) -> None:
    ones = graph.put(f"{name}.ones", np.ones(K, np.float32))
    graph.op("MatMul", [terms(graph, name, w), ones], f"{name}.y")


def scaled_by_activations(graph: Graph, name: str, w: np.ndarray) -> None:
    largest = graph.op("ReduceMax", ["x"], f"{name}.r", keepdims=0)
    graph.op(
        "MatMul", ["x", graph.op("Mul", [graph.put(name, w.T.copy()), largest], f"{name}.m")], f"{name}.y"
    )


def added_to_an_input(graph: Graph, name: str, w: np.ndarray) -> None:
    change = graph.ask("change", [K, N])
    graph.op(
        "MatMul", ["x", graph.op("Add", [graph.put(name, w.T.copy()), change], f"{name}.m")], f"{name}.y"
    )


def joined_to_activations(graph: Graph, name: str, w: np.ndarray) -> None:
    both = graph.op("Concat", [graph.put(name, w), "x"], f"{name}.m", axis=0)
    graph.op("Gemm", ["x", both], f"{name}.y", transB=1)


def all_rows(graph: Graph, name: str, w: np.ndarray) -> str:
    shape = graph.op("Shape", ["x"], f"{name}.s", start=1, end=2)
    zero, one = graph.put(f"{name}.0", np.array(0)), graph.put(f"{name}.1", np.array(1))
    rows = graph.op("Range", [zero, graph.op("Squeeze", [shape], f"{name}.k"), one], f"{name}.i")
    return graph.op("Gather", [graph.put(name, w.T.copy()), rows], f"{name}.m")


def looked_up_whole(graph: Graph, name: str, w: np.ndarray) -> None:
    graph.op("MatMul", ["x", all_rows(graph, name, w)], f"{name}.y")


def looked_up_whole_and_summed(graph: Graph, name: str, w: np.ndarray) -> None:
    wide = graph.op("Unsqueeze", ["x", graph.put(f"{name}.two", np.array([2]))], f"{name}.u")
    product = graph.op("Mul", [wide, all_rows(graph, name, w)], f"{name}.p")
    graph.op("ReduceSum", [product, f"{name}.1"], f"{name}.y")


COMBINED: dict[str, Piece] = {
    piece.__name__: piece
    for piece in (
        summed_terms, mean_of_moved_terms, terms_times_ones, scaled_by_activations, added_to_an_input,
        joined_to_activations, looked_up_whole, looked_up_whole_and_summed,
    )
}  # fmt: skip
UNREAD: dict[str, Piece] = COMBINED | {
    piece.__name__: piece for piece in (unused, to_an_unknown_standard_operator)
}
ALL = READ | REFUSED | LEFT_OUT | UNREAD


def named(weights: Weights) -> dict[str, set[str]]:
    return {
        "sites": set(weights.sites.transposed),
        "refused": set(weights.sites.unreadable),
        "left out": set(weights.sites.left_out),
        "unread": set(weights.sites.unread),
    }


def build(path: Path, *pieces: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """A graph of pieces (name of the piece, kind of its weight); the names of the weights -> the two."""
    graph, names = Graph(), {}
    for at, (piece, kind) in enumerate(pieces):
        name = f"w{at}" if piece != "head" else f"w{at}.lm_head"
        ALL[piece](graph, name, weight(kind, at))
        names[name] = (piece, kind)
    graph.write(path)
    return names


def mask_of(piece: str, kind: str, seed: int = 0) -> PackedMask:
    """What a readable piece's site must be."""
    matrix = torch.from_numpy(weight(kind, seed))
    if piece in ("of_a_stack", "einsum_first", "scanned"):
        matrix = torch.stack([matrix, matrix])
    return pack_mask(matrix[None] if piece == "lstm" else matrix)


@pytest.mark.parametrize("piece", READ)
def test_a_weight_is_read_through(tmp_path, piece):
    for kind in ("2:4", "dense"):
        names = build(tmp_path / "m.onnx", (piece, kind))
        weights = read_graph(tmp_path / "m.onnx")
        (name,) = names
        sites = weights.sites.transposed
        assert name in sites
        assert sites.keys() - {name} <= {f"{name}.again", f"{name}.b"}
        assert not {**weights.sites.unreadable, **weights.sites.unread, **weights.sites.left_out}
        assert weights.scan(name, sites[name]).mask == mask_of(piece, kind)
        assert name in weights.names
        verdict = verify(tmp_path / "m.onnx", pattern="2:4")
        assert {site.name for site in verdict.failed} == (set() if kind == "2:4" else {name})


@pytest.mark.parametrize("piece", REFUSED)
def test_a_weight_that_cannot_be_looked_at_fails_and_is_named(tmp_path, piece):
    build(tmp_path / "m.onnx", (piece, "2:4"), ("plain", "2:4"))
    assert named(read_graph(tmp_path / "m.onnx")) == {
        "sites": {"w1"}, "refused": {"w0"}, "left out": set(), "unread": set()
    }  # fmt: skip
    (failed,) = run_check(Check(tmp_path / "m.onnx", Requirements.of("2:4"))).failed
    assert failed.name == "w0"
    operator = {
        "n_bits": "MatMulNBits", "unknown": "Mystery", "summed_twice": "Einsum", "kernel": "Conv",
        "picked_by_element": "Where", "scaled_at_run_time": "Mul", "not_evaluated": "Det",
    }[piece]  # fmt: skip
    assert operator in (failed.reason or "")
    assert "allow the site to be dense" in (failed.reason or "")
    assert verify(tmp_path / "m.onnx", pattern="2:4", allow_dense=["w0"]).ok


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("looked_up", "looked up"),
        ("added", "only Add reads it"),
        ("outer", "dimension of size 1"),
        ("rotary", "only Mul reads it"),
        ("masked", "only Add reads it"),
        ("normed", "looked up"),
        ("depthwise", "each channel by itself"),
        ("head", "its name"),
    ],
)
def test_a_matrix_that_is_not_a_weight_of_a_product_is_named_with_its_reason(tmp_path, piece, reason):
    (name, _) = build(tmp_path / "m.onnx", (piece, "dense"), ("plain", "2:4"))
    weights = read_graph(tmp_path / "m.onnx")
    assert named(weights) == {"sites": {"w1"}, "refused": set(), "left out": {name}, "unread": set()}
    assert reason in weights.sites.left_out[name]
    assert verify(tmp_path / "m.onnx", pattern="2:4").ok


@pytest.mark.parametrize("piece", UNREAD)
def test_what_no_product_reads_is_unread(tmp_path, piece):
    build(tmp_path / "m.onnx", (piece, "dense"), ("plain", "2:4"))
    assert named(read_graph(tmp_path / "m.onnx")) == {
        "sites": {"w1"}, "refused": set(), "left out": set(), "unread": {"w0"}
    }  # fmt: skip


@pytest.mark.parametrize("piece", COMBINED)
def test_a_matrix_that_may_be_a_weight_after_it_is_combined_fails_under_full_coverage(tmp_path, piece):
    build(tmp_path / "m.onnx", (piece, "dense"), ("plain", "2:4"))
    reason = read_graph(tmp_path / "m.onnx").sites.unread["w0"]
    assert "multiplies by it" in reason or "sums over the result" in reason
    assert not verify(tmp_path / "m.onnx", pattern="2:4", coverage="all").ok


@pytest.mark.parametrize("opset", [10, 13, 18])
def test_a_quantised_weight_of_an_old_opset_is_read(tmp_path, opset):
    for kind in ("2:4", "dense"):
        graph = Graph(opset)
        ends = [graph.put("s", np.array(0.01, "f4")), graph.put("z", np.array(3, np.int8))]
        axis = {}
        if opset >= 13:
            ends = [graph.put("sn", np.full(N, 0.01, "f4")), graph.put("zn", np.full(N, 3, np.int8))]
            axis = {"axis": 1}
        packed = graph.put("w", quantized(weight(kind)).T.copy())
        graph.op("MatMul", ["x", graph.op("DequantizeLinear", [packed, *ends], "d", **axis)], "y")
        verdict = verify(graph.write(tmp_path / "m.onnx"), pattern="2:4")
        assert {site.name for site in verdict.sites} == {"w"}
        assert verdict.ok == (kind == "2:4")


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.0.mlp.gate.weight", True),
        ("embedder.layers.0.q_proj.weight", True),
        ("lm_head.inner.weight", True),
        ("router.0.down_proj", True),
        ("model.embed_tokens.weight", False),
        ("lm_head", False),
        ("wte.weight", False),
    ],
)
def test_only_the_last_module_of_a_name_tells_that_it_is_not_a_site(tmp_path, name, site):
    graph = Graph()
    plain(graph, name, weight("dense"))
    assert name in named(read_graph(graph.write(tmp_path / "m.onnx")))["sites" if site else "left out"]


@pytest.mark.parametrize("op", ["TopK", "ArgMax", "Relu"])
@pytest.mark.parametrize("name", ["mlp.gate.weight", "mlp.router", "mlp.gate.proj.weight"])
def test_a_router_is_one_whose_largest_results_are_chosen(tmp_path, op, name):
    graph = Graph()
    plain(graph, name, weight("dense"))
    shares = graph.op("Softmax", [graph.op("Identity", [f"{name}.y"], "i")], "shares")
    if op == "TopK":
        two = graph.put("two", np.array([2]))
        graph.nodes.append(helper.make_node("TopK", [shares, two], ["best", "which"]))
    else:
        graph.op(op, [shares], "which")
    router = op != "Relu" and "proj" not in name
    assert name in named(read_graph(graph.write(tmp_path / "m.onnx")))["left out" if router else "sites"]


@pytest.mark.parametrize(
    ("reader", "place"), [("MatMul", "sites"), ("Mystery", "refused"), ("Mul", "unread"), (None, None)]
)
def test_a_part_of_a_packed_weight_that_is_also_read_otherwise_is_accounted_for(tmp_path, reader, place):
    graph = Graph()
    runs, kept = N * K // 4, 2
    graph.put("values", np.ones((runs, kept), np.float32))
    graph.put("codes", np.zeros(runs, np.uint8))
    graph.put("table", np.array([[0, 1]]))
    graph.put("runs", np.array([runs, 4]))
    graph.put("shape", np.array([N, K]))
    graph.op("ConstantOfShape", ["runs"], "zeros")
    graph.op("Gather", ["table", graph.op("Cast", ["codes"], "wide", to=TensorProto.INT32)], "places", axis=0)
    graph.op("ScatterElements", ["zeros", "places", "values"], "scattered", axis=1)
    graph.op("Gemm", ["x", graph.op("Reshape", ["scattered", "shape"], "w")], "y", transB=1)
    if reader == "Mul":
        wide = graph.op("Unsqueeze", [graph.ask("pairs", ["b", kept]), graph.put("one", np.array([1]))], "u")
        graph.op("ReduceSum", [graph.op("Mul", [wide, "values"], "m"), graph.put("2", np.array([2]))], "z")
    elif reader is not None:
        domain = "" if reader == "MatMul" else "com.example"
        graph.op(reader, [graph.ask("many", ["b", runs]), "values"], "z", domain=domain)
    places = named(read_graph(graph.write(tmp_path / "m.onnx")))
    assert "w" in places["sites"]
    assert [each for each, held in places.items() if "values" in held] == ([place] if place else [])


def test_a_constant_of_an_empty_shape_is_a_number(tmp_path):
    graph = Graph()
    graph.put("w", weight("2:4"))
    value = helper.make_tensor("value", FLOAT, [1], [2.0])
    two = graph.op("ConstantOfShape", [graph.put("none", np.zeros(0, np.int64))], "two", value=value)
    graph.op("Gemm", ["x", graph.op("Mul", ["w", two], "doubled")], "y", transB=1)
    weights = read_graph(graph.write(tmp_path / "m.onnx"))
    assert weights.scan("w", False).mask == pack_mask(torch.from_numpy(weight("2:4")))


@examples(6)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ALL)), st.sampled_from(["2:4", "dense"])), min_size=1, max_size=6
    )
)
def test_every_weight_of_any_graph_is_in_exactly_one_place(tmp_path, pieces):
    names = build(tmp_path / "m.onnx", *pieces, ("plain", "2:4"))
    weights = read_graph(tmp_path / "m.onnx")
    places = named(weights)
    for at, (name, (piece, kind)) in enumerate(names.items()):
        expected = next(
            place
            for place, known in (
                ("sites", READ), ("refused", REFUSED), ("left out", LEFT_OUT), ("unread", UNREAD)
            )
            if piece in known
        )  # fmt: skip
        assert [place for place, held in places.items() if name in held] == [expected], piece
        if expected == "sites":
            assert weights.scan(name, weights.sites.transposed[name]).mask == mask_of(piece, kind, at)
    holds = all(kind == "2:4" for piece, kind in names.values() if piece in READ)
    verdict = run_check(Check(tmp_path / "m.onnx", Requirements.of("2:4")))
    assert verdict.ok == (holds and not any(piece in REFUSED for piece, _ in names.values()))


def test_a_tied_table_is_checked_as_the_product_reads_it(tmp_path):
    """It is looked up and multiplied by: only its name can tell that it is the head."""
    for name, place in (("table", "sites"), ("embed.weight", "left out")):
        graph = Graph()
        looked_up(graph, name, weight("dense"))
        turned = graph.op("Transpose", [name], "turned", perm=[1, 0])
        graph.op("MatMul", ["x", turned], "logits")
        graph.write(tmp_path / "m.onnx")
        assert name in named(read_graph(tmp_path / "m.onnx"))[place]


def test_a_quantised_weight_is_not_left_out_by_its_name(tmp_path):
    graph = Graph()
    dynamic(graph, "lm_head.weight", weight("dense"))
    assert verify(graph.write(tmp_path / "m.onnx"), pattern="2:4").failed[0].name == "lm_head.weight"


def test_a_weight_that_two_products_sum_over_both_ways_is_checked_both_ways(tmp_path):
    graph = Graph()
    square = weight("2:4")[:, :N].copy()
    graph.op("MatMul", [graph.ask("v", ["b", N]), graph.put("w", square.T.copy())], "y")
    graph.op("Gemm", ["v", "w"], "z", transB=1)
    verdict = verify(graph.write(tmp_path / "m.onnx"), pattern="2:4")
    assert [site.name for site in verdict.sites] == ["w", "w/z"]
    assert [site.name for site in verdict.failed] == ["w/z"]


def test_the_parts_of_a_split_weight_are_checked_each(tmp_path):
    graph = Graph()
    both = np.concatenate([weight("2:4").T, weight("dense").T], axis=1)
    graph.put("w", both)
    graph.nodes.append(helper.make_node("Split", ["w"], ["q", "k"], axis=1, num_outputs=2))
    for part in "qk":
        graph.op("MatMul", ["x", part], f"{part}.y")
    weights = read_graph(graph.write(tmp_path / "m.onnx"))
    assert not {**weights.sites.unreadable, **weights.sites.unread}
    verdict = verify(tmp_path / "m.onnx", pattern="2:4")
    assert len(verdict.sites) == 2
    assert len(verdict.failed) == 1


def test_two_weights_of_one_name_in_two_branches_are_two_sites(tmp_path):
    graph = Graph()
    branches = {}
    for label, kind in (("then", "2:4"), ("else", "dense")):
        node = helper.make_node("MatMul", ["x", "w"], [f"y_{label}"])
        branches[f"{label}_branch"] = helper.make_graph(
            [node],
            label,
            [],
            [helper.make_empty_tensor_value_info(f"y_{label}")],
            [numpy_helper.from_array(weight(kind).T.copy(), "w")],
        )
    choice = graph.ask("choice", [], TensorProto.BOOL)
    graph.nodes.append(helper.make_node("If", [choice], ["y"], name="choose", **branches))
    verdict = verify(graph.write(tmp_path / "m.onnx"), pattern="2:4")
    assert {site.name for site in verdict.sites} == {"w", "choose.else_branch/w"} or {
        site.name for site in verdict.sites
    } == {"w", "choose.then_branch/w"}
    assert len(verdict.failed) == 1


def test_products_that_the_manifest_of_an_export_does_not_name_are_unread_or_refused(tmp_path):
    """Its configuration, which may know more of them, is for whoever opens the export."""
    graph = Graph()
    for at, piece in enumerate((gemm, dynamic, n_bits, looked_up, unused)):
        piece(graph, f"w{at}", weight("2:4", at))
    graph.write(tmp_path / GRAPH)
    record = TensorRecord(
        name="stored.name", shape=[N, K], dtype="F32", layout="dense", part=Part(initializer="w0")
    )
    own: dict[str, Any] = {"spp_fx_version": VERSION, "format": "onnx-dense", "pattern": "2:4"}
    write_manifest(tmp_path, **own, requirements={}, sizes={}, tensors=[record])
    weights = read_graph(tmp_path / GRAPH)
    assert named(weights) == {
        "sites": {"stored.name"}, "refused": {"w2"}, "left out": {"w3"}, "unread": {"w1", "w4"}
    }  # fmt: skip
    assert "does not name it" in weights.sites.unread["w1"]
    assert weights.scan("stored.name", False).mask == mask_of("gemm", "2:4")


# Files that want to take time or memory


def hostile(graph: Graph, path: Path) -> Weights:
    weights = read_graph(graph.write(path))
    for name, transposed in weights.sites.transposed.items():
        weights.scan(name, transposed)
    return weights


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("ConstantOfShape", [np.array([2**20, 2**20])], {}),
        ("Expand", [np.ones((2, 1), np.float32), np.array([2**20, 2, 2**20])], {}),
        ("Tile", [np.ones((4, 4), np.float32), np.array([2**18, 2**18])], {}),
        ("Range", [np.array(0), np.array(2**40), np.array(1)], {}),
        ("Resize", [np.ones((4, 4), np.float32), np.zeros(0, "f4"), np.array([1e5, 1e5], "f4")], {}),
        ("Pad", [np.ones((4, 4), np.float32), np.array([0, 0, 2**20, 2**20])], {}),
        ("Gather", [np.ones((1, 2**15), np.float32), np.zeros(2**15, np.int64)], {}),
        ("Mul", [np.ones((2**15, 1), np.float32), np.ones((1, 2**15), np.float32)], {}),
        ("Split", [np.ones((4, 4), np.float32)], {"num_outputs": 2**40}),
        ("DequantizeLinear", [np.ones((4, 4), np.int8), np.ones((4, 4), "f4")], {"block_size": 2**40}),
    ],
)  # fmt: skip
def test_what_would_grow_without_bound_is_refused(tmp_path, op, inputs, attributes):
    graph = Graph()
    names = [graph.put(f"in{at}", array) for at, array in enumerate(inputs)]
    made = graph.op(op, names, "made", **attributes)
    if op == "Range":
        made = graph.op("Reshape", [made, graph.put("shape", np.array([2, -1]))], "shaped")
    graph.op("MatMul", ["x", graph.op("Neg", [made], "negative")], "y")
    (failed,) = run_check(Check(graph.write(tmp_path / "m.onnx"), Requirements.of("2:4"))).failed
    assert op in (failed.reason or "")


def test_functions_that_multiply_are_stopped(tmp_path):
    graph = Graph()
    for level in range(40):
        inner = f"F{level + 1}" if level < 39 else "Neg"
        domain = "local" if level < 39 else ""
        nodes = [helper.make_node(inner, ["a"], [out], domain=domain) for out in ("b", "c")]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
        graph.functions.append(helper.make_function("local", f"F{level}", ["a"], ["b"], nodes, opsets))
    graph.op("F0", ["x"], "y", domain="local")
    with pytest.raises(FormatError, match=r"m\.onnx: its local functions grow to more than"):
        hostile(graph, tmp_path / "m.onnx")


def test_a_function_that_calls_itself_is_stopped(tmp_path):
    graph = Graph()
    node = helper.make_node("F", ["a"], ["b"], domain="local")
    graph.functions.append(
        helper.make_function("local", "F", ["a"], ["b"], [node], [helper.make_opsetid("local", 1)])
    )
    graph.op("F", ["x"], "y", domain="local")
    with pytest.raises(FormatError, match=r"F calls itself"):
        hostile(graph, tmp_path / "m.onnx")


def test_nodes_in_a_circle_are_refused(tmp_path):
    graph = Graph()
    graph.op("Identity", ["b"], "a")
    graph.op("Transpose", ["a"], "b")
    graph.op("MatMul", ["x", "b"], "y")
    with pytest.raises(FormatError, match=r"m\.onnx: (Identity a|Transpose b) reads its own result"):
        hostile(graph, tmp_path / "m.onnx")


def test_choices_that_multiply_end(tmp_path):
    graph = Graph()
    last = graph.put("w", weight("2:4").T.copy())
    choice = graph.ask("choice", [], TensorProto.BOOL)
    for level in range(40):
        branches = {
            f"{label}_branch": helper.make_graph(
                [helper.make_node("Identity", [last], [f"{label}{level}"])],
                label,
                [],
                [helper.make_empty_tensor_value_info(f"{label}{level}")],
            )
            for label in ("then", "else")
        }
        graph.nodes.append(helper.make_node("If", [choice], [f"if{level}"], **branches))
        last = f"if{level}"
    graph.op("MatMul", ["x", last], "z")
    assert set(hostile(graph, tmp_path / "m.onnx").sites.unreadable) == {"w"}


def test_a_damaged_weight_of_a_constant_node_names_itself_and_the_file(tmp_path):
    graph = Graph()
    constant_node(graph, "w", weight("2:4"))
    graph.nodes[0].attribute[0].t.raw_data = b"\0" * 7
    with pytest.raises(FormatError, match=r"^w \(.*m\.onnx\): 7 bytes of data"):
        verify(graph.write(tmp_path / "m.onnx"), pattern="2:4")


def test_external_data_of_a_constant_node_stays_in_the_folder(tmp_path):
    graph = Graph()
    constant_node(graph, "w", weight("2:4"))
    tensor = graph.nodes[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(FormatError, match=r"^w \(.*not inside the model's folder"):
        verify(graph.write(tmp_path / "m.onnx"), pattern="2:4")
