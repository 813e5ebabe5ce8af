"""onnx-dense: dense constants whose pattern lies along the product, and lives through every optimiser."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxscript import optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

from spp_fx.exporters.onnx.encodings import DenseConstants, why_not_sparse
from spp_fx.verbs.export import export
from spp_fx.verbs.verify import verify
from tests.command import must
from tests.exporters.onnx_files import (
    axes,
    bits,
    matmul_model,
    product,
    read_back,
    sites_of,
    two_of_four,
    write_weight,
)
from tests.families import make_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small 2:4 Llama, one of whose projections (24 wide) is no multiple of what tensor cores take."""
    root = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, intermediate_size=24)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    must("prune", root / "model", "-o", root / "sparse")
    return export(root / "sparse", root / "out", "onnx-dense", with_past=True, dtype="float16")


def sparse_factors(model: onnx.ModelProto) -> int:
    """How many right-hand constants of products hold 2:4 along the dimension that is summed over.

    onnxruntime widens float16 constants on a CPU, by a Cast in front of the product.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    cast = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    count = 0
    for node in model.graph.node:
        name = cast.get(node.input[1], node.input[1]) if len(node.input) > 1 else ""
        if node.op_type in ("MatMul", "Gemm") and name in constants:
            weight = numpy_helper.to_array(constants[name])
            if any(each.name == "transB" and each.i for each in node.attribute):
                weight = weight.T
            kept = (weight.T.reshape(-1, 4) != 0).sum(axis=1)
            count += bool(kept.max() <= 2)
    return count


def test_the_pattern_lies_along_the_product(exported):
    model = onnx.load(exported.out / "model.onnx")
    assert sparse_factors(model) == 7
    weights = [tensor for tensor in model.graph.initializer if tensor.name.startswith("model.layers.")]
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}


def test_a_cache_has_optimums_names(exported):
    shapes = axes(onnx.load(exported.out / "model.onnx"))
    total = "past_sequence_length + sequence_length"
    assert list(shapes)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert shapes["attention_mask"] == ["batch_size", total]
    assert shapes["past_key_values.0.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["present.0.value"] == ["batch_size", 2, total, 8]
    assert len(shapes) == 3 + 2 + 1 + 2


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_it_lives_through_onnxruntimes_optimisations(exported, tmp_path, level):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = str(exported.out / "model.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert sparse_factors(onnx.load(tmp_path / "optimized.onnx")) == 7


def test_it_lives_through_onnxscripts_optimiser(exported):
    assert sparse_factors(optimizer.optimize(onnx.load(exported.out / "model.onnx"))) == 7


def test_what_tensor_cores_do_not_take_is_said(exported):
    records = {record.name: record for record in exported.manifest.tensors}
    taken, refused = (
        records[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert (taken.details["tensorrt"], taken.reason) == ("sparse", None)
    assert refused.details["tensorrt"] == "dense"
    assert refused.reason == "TensorRT runs it dense: 24 x 32 is not in multiples of 16"
    reasons = Counter(record.reason for record in records.values() if record.reason)
    assert list(reasons.values()) == [1, 2]  # down, gate and up
    manifest = json.loads((exported.out / "export.json").read_text())
    assert {record["layout"] for record in manifest["tensors"]} == {"dense_constant"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weight_is_written_as_the_product_reads_it(tmp_path, dtype):
    weight = two_of_four((16, 32), dtype)
    path = tmp_path / "m.onnx"
    done = write_weight(path, weight, DenseConstants())
    assert done.swapped
    assert "Transpose" not in [node.op_type for node in onnx.load(path).graph.node]
    assert bits(read_back(path).T) == bits(weight)
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(product(path, 32), weight.float().numpy().T)


@pytest.mark.parametrize(
    ("shape", "pattern", "reason"),
    [
        ((16, 32), "50%", "the pattern is 50%, sparse tensor cores take 2:4"),
        ((16, 32), "2:4", "read by Cast, not by a MatMul or Gemm"),
    ],
)
def test_every_reason_is_named(tmp_path, shape, pattern, reason):
    weight = two_of_four(shape, torch.float16)
    model = matmul_model(shape[1], shape[0], TensorProto.FLOAT16)
    done = write_weight(tmp_path / "m.onnx", weight, DenseConstants(), pattern, model=model)
    assert done.reason == f"TensorRT runs it dense: {reason}"


def test_nothing_is_refused_and_the_size_is_the_weights():
    weight = two_of_four((16, 32))
    encoding = DenseConstants()
    assert encoding.why_dense(sites_of(weight, "50%")) is None
    assert encoding.size(sites_of(weight, "2:4")) == weight.nbytes


@pytest.mark.parametrize(("pattern", "taken"), [("1:4", True), ("1:2", True), ("2:8", False), ("4:8", False)])
def test_a_tighter_pattern_is_taken_where_it_holds_2_4(pattern, taken):
    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["X", "W"], ["Y"])], "g", [], [])
    )
    sites = sites_of(torch.zeros(32, 32, dtype=torch.float16), pattern)
    assert (why_not_sparse(sites, list(model.graph.node)) is None) == taken


def test_a_file_without_its_manifest_is_checked_against_the_models_names(exported, tmp_path):
    """The product that reads a constant shows its orientation."""
    path = tmp_path / "alone.onnx"
    path.write_bytes((exported.out / "model.onnx").read_bytes())
    source = exported.out.parent / "sparse"
    for verdict in (
        verify(path, pattern="2:4"),
        verify(path, against=source),
        verify(path, lock=source / "sparsity.lock.json"),
    ):
        assert verdict.ok
        assert len(verdict.sites) == 7


def test_float64_has_a_form_too(tmp_path):
    make_model("llama", one_layer=True).double().save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    done = export(tmp_path / "sparse", tmp_path / "out", "onnx-dense", with_past=True)
    assert done.checks["masks_equal"] == 7
    assert done.checks["computed_in"] == "float64"
