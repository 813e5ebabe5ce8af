"""A written file is run and compared; a file that computes something else is refused."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from spp_fx.errors import FormatError, SppFxError
from spp_fx.exporters.onnx_check import check_standard, compare_logits, run_onnx
from spp_fx.exporters.onnx_graph import build_onnx
from spp_fx.exporters.onnx_reader import load_sparse_masks
from spp_fx.exporters.onnx_sparse import save, sparsify

VOCAB = 97
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prune(model: nn.Module) -> list[str]:
    """Keep the two largest of every four inputs of each linear; returns the weights' names."""
    names = [name for name, _ in model.named_parameters() if name.split(".")[-2] in LINEARS]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().float().topk(2, largest=False).indices, 0)
    return names


def logits_of(model: nn.Module):
    return lambda input_ids, attention_mask: model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return model, prune(model), build_onnx(model)


@pytest.fixture
def story():
    data = Path(os.environ.get("SPP_FX_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (data / "story-656k").is_dir():
        pytest.skip(f"no story-656k in {data}; set SPP_FX_DATA")
    return data / "story-656k"


@pytest.mark.parametrize("indices", ["smallest", "int64"])
@pytest.mark.parametrize("external_threshold", [0, 2**30], ids=["external", "inline"])
def test_a_sparse_model_computes_the_dense_model_s_logits(tmp_path, pruned, indices, external_threshold):
    model, names, dense = pruned
    sparse, reports = sparsify(dense, names, indices)
    path = tmp_path / "model.onnx"
    save(sparse, path, external_threshold=external_threshold)
    assert all(report.reason is None for report in reports)
    if indices == "int64":
        check_standard(path)
    comparison = compare_logits(path, logits_of(model), VOCAB, tolerance=1e-5)
    assert comparison.argmax_agreement == 1
    assert comparison.positions == 1 + (14 - 2 * 2) + (48 - 2 * 5) + 33


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_exports_sparse_with_equal_logits_and_masks(tmp_path, story, dtype):
    model = AutoModelForCausalLM.from_pretrained(story, dtype=getattr(torch, dtype)).eval()
    model.config.use_cache = False
    names = prune(model)
    sparse, _ = sparsify(build_onnx(model), names, "int64")
    path = tmp_path / "model.onnx"
    save(sparse, path, external_threshold=2**20)
    check_standard(path)

    comparison = compare_logits(path, logits_of(model), 2048, max_length=512)
    assert comparison.computed_in == "float32"
    exact = compare_logits(path, logits_of(model.float()), 2048, tolerance=1e-4)
    assert exact.argmax_agreement == 1
    read = {entry.name: entry for entry in load_sparse_masks(path)}
    for name in names:
        assert np.array_equal(read[name].mask(), (model.get_parameter(name) != 0).numpy())


def test_run_onnx_returns_the_logits(tmp_path, pruned):
    dense = pruned[2]
    save(dense, tmp_path / "m.onnx")
    input_ids = np.arange(10, dtype=np.int64).reshape(2, 5)
    logits = run_onnx(tmp_path / "m.onnx", input_ids, np.ones_like(input_ids))
    assert (logits.shape, logits.dtype) == ((2, 5, VOCAB), np.float32)


def test_a_changed_weight_is_noticed(tmp_path, pruned):
    model, names, dense = pruned
    changed = onnx.ModelProto()
    changed.CopyFrom(dense)
    tensor = next(t for t in changed.graph.initializer if t.name == names[0])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    save(changed, tmp_path / "m.onnx")
    with pytest.raises(SppFxError, match="logits differ from the reference by up to"):
        compare_logits(tmp_path / "m.onnx", logits_of(model), VOCAB)


def test_a_mask_that_is_ignored_is_noticed(tmp_path, pruned):
    model, _, dense = pruned
    save(dense, tmp_path / "m.onnx")

    def without_mask(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask)).logits

    with pytest.raises(SppFxError, match="differ"):
        compare_logits(tmp_path / "m.onnx", without_mask, VOCAB)


def test_a_reference_that_is_not_finite_is_no_reference(tmp_path, pruned):
    model, _, dense = pruned
    save(dense, tmp_path / "m.onnx")
    with pytest.raises(SppFxError, match="the reference's logits are not finite"):
        compare_logits(tmp_path / "m.onnx", lambda i, m: logits_of(model)(i, m) * torch.nan, VOCAB)


def test_another_vocabulary_is_refused(tmp_path, pruned):
    model, _, dense = pruned
    save(dense, tmp_path / "m.onnx")
    with pytest.raises(SppFxError, match="logits have shape"):
        compare_logits(tmp_path / "m.onnx", lambda i, m: logits_of(model)(i, m)[..., :-1], VOCAB)


def test_what_onnxruntime_cannot_load_is_one_clear_error(tmp_path, pruned):
    _, names, dense = pruned
    sparse, _ = sparsify(dense, names)
    save(sparse, tmp_path / "m.onnx", external_threshold=0)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(SppFxError, match="onnxruntime cannot load the model"):
        compare_logits(tmp_path / "m.onnx", lambda i, m: i, VOCAB)
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(FormatError, match="not an ONNX model"):
        compare_logits(tmp_path / "m.onnx", lambda i, m: i, VOCAB)


@pytest.mark.parametrize("external_threshold", [0, 2**30], ids=["external", "inline"])
def test_narrow_indices_are_outside_the_standard(tmp_path, pruned, external_threshold):
    _, names, dense = pruned
    sparse, _ = sparsify(dense, names, "smallest")
    save(sparse, tmp_path / "m.onnx", external_threshold=external_threshold)
    with pytest.raises(SppFxError, match=r"not valid by the ONNX standard: .*INT64"):
        check_standard(tmp_path / "m.onnx")


@pytest.mark.parametrize("external_threshold", [0, 2**30], ids=["external", "inline"])
def test_a_broken_graph_is_outside_the_standard(tmp_path, pruned, external_threshold):
    _, names, dense = pruned
    sparse, _ = sparsify(dense, names, "int64")
    sparse.graph.node[-1].input[0] = "nobody computes this"
    save(sparse, tmp_path / "m.onnx", external_threshold=external_threshold)
    with pytest.raises(SppFxError, match="not valid by the ONNX standard"):
        check_standard(tmp_path / "m.onnx")
