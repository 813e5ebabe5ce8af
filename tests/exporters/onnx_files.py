"""Small .onnx files with one weight, written by the encoders of the formats."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from spp_fx.exporters.format import make_format
from spp_fx.exporters.manifest import Part
from spp_fx.exporters.onnx import model_writer
from spp_fx.exporters.onnx.encodings import Encoded, Encoding, SparseInitializers
from spp_fx.exporters.onnx.graph_parameters import GraphParameter
from spp_fx.exporters.onnx.graph_weights import GraphWeights
from spp_fx.exporters.onnx.graph_writer import graph_writer, onnx_type
from spp_fx.exporters.onnx.onnxruntime_check import (
    Comparison,
    OnnxModel,
    compare_outputs,
    reference_of,
)
from spp_fx.exporters.onnx.random_inputs import draw_batches
from spp_fx.graph.task import BATCH, LENGTH, Input, find_task
from spp_fx.parallel import no_tick
from spp_fx.sparsity.lock import make_entry
from spp_fx.sparsity.pattern import parse_pattern
from spp_fx.sparsity.scan import pack_mask


def two_of_four(shape, dtype=torch.float32, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight.view(-1, 4)[:, [0, 3]] = 0
    return weight


def matmul_model(columns: int, rows: int, dtype: int = TensorProto.FLOAT, opset: int = 18):
    """Y = X @ W^T in float32, for a W (rows, columns) of any type that is still to be put in."""
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["W"], ["turned"], perm=[1, 0]),
            helper.make_node("Cast", ["turned"], ["wide"], to=TensorProto.FLOAT)
            if dtype != TensorProto.FLOAT
            else helper.make_node("Identity", ["turned"], ["wide"]),
            helper.make_node("MatMul", ["X", "wide"], ["Y"]),
        ],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", rows])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def axes(proto: onnx.ModelProto) -> dict[str, list[str | int]]:
    """The dimensions of the inputs and outputs of a graph."""
    values = [*proto.graph.input, *proto.graph.output]
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def sites_of(weight: torch.Tensor, pattern: str, transposed: bool = False) -> GraphParameter:
    entry = make_entry(
        "W", "linear", pack_mask(weight, transposed=transposed), parse_pattern(pattern), transposed
    )
    entries = ((entry, Part(initializer="W")),)
    return GraphParameter("W", tuple(weight.shape), onnx_type(weight.dtype), entries, True, transposed)


def write_weight(
    path: Path,
    weight: torch.Tensor,
    encoding: Encoding,
    pattern: str = "2:4",
    *,
    model=None,
    transposed: bool = False,
    external: bool = False,
) -> Encoded:
    """Put `weight` as W into a model (by default `matmul_model`) and write it."""
    proto = model or matmul_model(weight.shape[-1], weight.shape[-2], onnx_type(weight.dtype))
    with graph_writer(proto, path, single_file_limit=-1 if external else 2**30) as writer:
        done = encoding.encode(sites_of(weight, pattern, transposed), weight, writer)
        proto.graph.initializer.extend(encoding.constants())
    return done


def write_sparse(path: Path, weight: torch.Tensor, indices="smallest", external: bool = False) -> Encoded:
    return write_weight(path, weight, SparseInitializers(indices), external=external)


def product(path: Path, columns: int, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    """What onnxruntime computes for X = 1: W^T."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": np.eye(columns, dtype=np.float32)})[0]


def read_back(path: Path, name: str = "W") -> torch.Tensor:
    return GraphWeights(path).read(name)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def replace(proto, name: str, array: np.ndarray) -> None:
    """Put other numbers into an initializer."""
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            return
    raise AssertionError(f"no initializer {name}")


def write_graph(source, graph, folder, format, monkeypatch, say=lambda line: None):
    """What export does with a source whose graph is there already; returns its checks."""
    monkeypatch.setattr(model_writer, "build_graph", lambda model, **_: deepcopy(graph))
    folder.mkdir()
    return make_format(format).write(source, folder, no_tick, say)


def greedy(path, input_ids, attention_mask, new):
    """The loop that every user of such a graph writes."""
    graph = OnnxModel(path)
    past, step, tokens = graph.empty_past(len(input_ids)), input_ids, input_ids
    for _ in range(new):
        logits, past = graph.step(step, attention_mask, past)
        step = logits[:, -1].argmax(axis=-1)[:, None].astype(np.int64)
        tokens = np.concatenate([tokens, step], axis=1)
        attention_mask = np.concatenate([attention_mask, np.ones_like(step)], axis=1)
    return tokens


def logits_of(model):
    """A causal language model as a function of its input_ids and attention_mask."""
    reference = reference_of(model, find_task("causal-lm"))
    return lambda ids, mask: reference({"input_ids": ids, "attention_mask": mask})["logits"]


def compare_logits(path, reference, vocabulary, *, tolerance=None, twin=False, **drawn) -> Comparison:
    """Compare a causal language model's file with a function of input_ids and attention_mask; see `draw_batches`."""
    tokens = (BATCH, LENGTH)
    entries = (Input("input_ids", tokens, vocabulary), Input("attention_mask", tokens, 2, default=1))
    return compare_outputs(
        path,
        lambda inputs: {"logits": reference(inputs["input_ids"], inputs["attention_mask"])},
        draw_batches(entries, torch.float32, **drawn),
        {"logits": tokens},
        vocabulary=vocabulary,
        tolerance=tolerance,
        twin=twin,
    )
