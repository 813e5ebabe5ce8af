"""Comparing a graph's logits with the model's notices what is wrong, and says what cannot be run."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.exporters.onnx import graph_writer
from spp_fx.exporters.onnx.onnxruntime_check import OnnxModel, check_standard
from spp_fx.verbs.export import export
from tests.command import must
from tests.effort import nightly
from tests.exporters.onnx_files import axes, compare_logits, logits_of
from tests.families import OTHER_TASKS, VOCABULARY, make_model
from tests.runtime.exports import save_sparse


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`sparse`, and its exports `inline` and `external`, both with int64 indices."""
    root = tmp_path_factory.mktemp("check")
    make_model("llama", one_layer=True).save_pretrained(root / "dense")
    must("prune", root / "dense", "-o", root / "sparse")
    options = {"indices": "int64", "compare_logits": True}
    done = export(root / "sparse", root / "inline", "onnx", **options)
    assert done.checks["standard_checker"] == "passed"
    assert done.checks["argmax_agreement"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_writer, "SINGLE_FILE_LIMIT", 0)
        export(root / "sparse", root / "external", "onnx", **options)
    assert (root / "external" / "model.onnx.data").is_file()
    return root


@pytest.fixture
def model(root):
    return AutoModelForCausalLM.from_pretrained(root / "sparse").eval()


def reference(model):
    return logits_of(model)


def changed(root, tmp_path, change, kind="inline"):
    folder = shutil.copytree(root / kind, tmp_path / "changed")
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("kind", ["inline", "external"])
def test_a_sparse_graph_computes_the_models_logits(root, model, kind):
    found = compare_logits(root / kind / "model.onnx", reference(model), VOCABULARY, tolerance=1e-5)
    assert found.argmax_agreement == 1
    assert found.positions == 1 + (14 - 2 * 2) + (48 - 2 * 5) + 33


def test_a_file_is_called_like_a_model(root):
    ids = np.arange(10, dtype=np.int64).reshape(2, 5)
    logits = OnnxModel(root / "inline" / "model.onnx").logits(ids, np.ones_like(ids))
    assert (logits.shape, logits.dtype) == ((2, 5, VOCABULARY), np.float32)


def test_a_changed_weight_is_noticed(root, tmp_path, model):
    def reverse(proto):
        tensor = next(t for t in proto.graph.initializer if t.name == "lm_head.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))

    with pytest.raises(SppFxError, match="logits differ from the reference by up to"):
        compare_logits(changed(root, tmp_path, reverse), reference(model), VOCABULARY)


def test_a_mask_that_is_ignored_is_noticed(root, model):
    def without_mask(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask)).logits

    with pytest.raises(SppFxError, match="differ"):
        compare_logits(root / "inline" / "model.onnx", without_mask, VOCABULARY)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * torch.nan, "the reference's logits are not finite"),
        (lambda x: x[..., :-1], "have shape"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(root, model, spoil, message):
    with pytest.raises(SppFxError, match=message):
        compare_logits(root / "inline" / "model.onnx", lambda i, m: spoil(reference(model)(i, m)), VOCABULARY)


def test_what_onnxruntime_cannot_load_is_one_clear_error(root, tmp_path):
    path = changed(root, tmp_path, lambda proto: None, "external")
    (path.parent / "model.onnx.data").unlink()
    with pytest.raises(SppFxError, match="onnxruntime cannot load the model"):
        compare_logits(path, lambda i, m: i, VOCABULARY)
    path.write_bytes(b"not a model")
    with pytest.raises(FormatError, match="not an ONNX model"):
        compare_logits(path, lambda i, m: i, VOCABULARY)


def narrow(proto):
    for sparse in proto.graph.sparse_initializer:
        indices = numpy_helper.to_array(sparse.indices)
        sparse.indices.CopyFrom(numpy_helper.from_array(indices.astype(np.int16)))


def broken(proto):
    proto.graph.node[-1].input[0] = "nobody computes this"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (narrow, "inline", r"not valid by the ONNX standard: .*INT64"),
        (broken, "inline", "not valid by the ONNX standard"),
        (broken, "external", "not valid by the ONNX standard"),
    ],
)
def test_what_is_outside_the_standard_is_refused(root, tmp_path, change, kind, message):
    with pytest.raises(SppFxError, match=message):
        check_standard(changed(root, tmp_path, change, kind))


BATCH, TEXT = "batch_size", ["batch_size", "sequence_length"]
ENCODER, DECODER = ([BATCH, f"{side}_sequence_length"] for side in ("encoder", "decoder"))
GRAPHS = {
    "bert": {"input_ids": TEXT, "attention_mask": TEXT, "token_type_ids": TEXT, "logits": [BATCH, 2]},
    "t5": {
        "input_ids": ENCODER, "attention_mask": ENCODER, "decoder_input_ids": DECODER, "logits": [*DECODER, 96],
    },
    "whisper": {"input_features": [BATCH, 8, 20], "decoder_input_ids": DECODER, "logits": [*DECODER, 96]},
    "vit": {"pixel_values": [BATCH, 3, 16, 16], "logits": [BATCH, 2]},
    # Its code makes a list of the images.
    "llava": {
        "input_ids": [1, TEXT[1]], "attention_mask": [1, TEXT[1]], "pixel_values": [1, 3, 16, 16],
        "logits": [1, TEXT[1], 96],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ["t5", "llava", *map(nightly, ("bert", "whisper", "vit"))])
def test_a_graph_of_another_task_computes_what_its_model_does(tmp_path, family):
    torch.manual_seed(0)
    folder = save_sparse(tmp_path / "model", OTHER_TASKS[family]().eval(), ("dense.", "wi."))
    said = []
    task = "image-text-to-text" if family == "llava" else None
    done = export(folder, tmp_path / "out", "onnx-packed", task=task, say=said.append)
    assert done.checks["max_abs_difference"] < 0.01 * done.checks["allowed_difference"]
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert axes(graph) == GRAPHS[family]
    stated = done.manifest.requirements
    assert stated.get("pixel_values") == {"vit": "(batch_size, 3, 16, 16)", "llava": "(1, 3, 16, 16)"}.get(
        family
    )
    assert any("1 row at a time" in line for line in said) == (family == "llava")
    if family == "t5":
        with pytest.raises(UsageError, match=r"--with-past is for causal-lm: .* for seq2seq-lm"):
            export(folder, tmp_path / "other", "onnx-packed", with_past=True)
