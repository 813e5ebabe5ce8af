"""What onnxruntime cannot run is known before a weight is written; what is shipped is what was run."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM, FalconConfig

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx import model_writer
from spp_fx.exporters.onnx.onnxruntime_check import (
    OnnxModel,
    compute_in_float32,
    why_not_opened,
)
from spp_fx.graph.model import hollow_model
from spp_fx.verbs.export import export, open_source
from tests.command import must
from tests.exporters.onnx_files import compare_logits, logits_of, write_graph
from tests.families import SMALL, VOCABULARY
from tests.runtime.exports import save_sparse

BF16, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT
FORMATS = ("onnx", "onnx-packed", "onnx-dense")
BATCHES = ((1, 1), (2, 61))


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def narrow(values, name="c"):
    tensor = torch.tensor(values).bfloat16()
    return helper.make_tensor(name, BF16, tensor.shape, tensor.view(torch.uint16).numpy().tobytes(), raw=True)


def model_of(nodes, *initializers, kind=F32):
    x, y = (helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def branch(name, op):
    out = helper.make_tensor_value_info(name, BF16, None)
    return helper.make_graph([node(op, "b c", name)], name, [], [out])


DOWN, UP = node("Cast", "x", "b", to=BF16), node("Cast", "z", "y", to=F32)
SCALE = [0.3, 7.1, -1e-3]
ISLANDS = {
    "an initializer": ([DOWN, node("Mul", "b c", "z"), UP], (narrow(SCALE),), lambda b, c: b * c),
    "a Constant": (
        [DOWN, node("Constant", "", "c", value=narrow(SCALE)), node("Add", "b c", "z"), UP],
        (),
        lambda b, c: b + c,
    ),
    "each operator rounds": (
        [DOWN, node("Mul", "b c", "m"), node("Add", "m b", "s"), node("Div", "s c", "z"), UP],
        (narrow(SCALE),),
        lambda b, c: (b * c + b) / c,
    ),
    "the result of an operator is another type": (
        [DOWN, node("Greater", "b c", "g"), node("Cast", "g", "y", to=F32)],
        (narrow(SCALE),),
        lambda b, c: b > c,
    ),
    "a constant made of a shape": (
        [
            DOWN,
            node("Shape", "b", "s"),
            node("ConstantOfShape", "s", "k", value=narrow([2.7])),
            node("Sub", "b k", "z"),
            UP,
        ],
        (),
        lambda b, c: b - torch.full_like(b, 2.7),
    ),
    "the branches of an If": (
        [
            DOWN,
            node("Constant", "", "yes", value=numpy_helper.from_array(np.array(False))),
            node("If", "yes", "z", then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")),
            UP,
        ],
        (narrow(SCALE),),
        lambda b, c: b * c,
    ),
    "a type taken from another tensor": (
        [
            DOWN,
            node("Constant", "", "k", value_float=0.7),
            node("CastLike", "k b", "n"),
            node("Mul", "b n", "z"),
            UP,
        ],
        (),
        lambda b, c: b * torch.tensor(0.7).bfloat16(),
    ),
}


@pytest.mark.parametrize("case", ISLANDS)
def test_a_step_in_bfloat16_runs_in_float32_between_casts_and_rounds_to_the_bit(case):
    nodes, initializers, compute = ISLANDS[case]
    model = model_of(nodes, *initializers)
    compute_in_float32(model, [])
    onnx.checker.check_model(model)
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).view(100, 3)
    for row in x:
        assert torch.equal(run(model, row), compute(row.bfloat16(), torch.tensor(SCALE).bfloat16()).float())


def test_bfloat16_in_casts_alone_is_left_as_it_is():
    model = model_of([DOWN, node("Cast", "b", "y", to=F32)])
    before = model.SerializeToString()
    compute_in_float32(model, [])
    assert model.SerializeToString() == before
    assert why_not_opened(model) is None
    x = torch.tensor([1.00390625, 3.0, -1e-40])
    assert torch.equal(run(model, x), x.bfloat16().float())


def test_a_parameter_that_is_still_to_come_is_known_by_its_type():
    model = model_of([DOWN, node("Mul", "b weight", "z"), UP])
    given = helper.make_tensor_value_info("weight", BF16, [3])
    compute_in_float32(model, [given])
    model.graph.initializer.append(narrow(SCALE, "weight"))
    x = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(run(model, x), (x.bfloat16() * torch.tensor(SCALE).bfloat16()).float())


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("Erf", TensorProto.DOUBLE),
        ("Softplus", TensorProto.INT16),
        ("Mul", BF16),
        ("Tanh", TensorProto.INT64),
    ],
)
def test_an_operator_without_a_kernel_is_named(op, kind):
    inputs = "x x" if op == "Mul" else "x"
    assert op in why_not_opened(model_of([node(op, inputs, "y")], kind=kind))
    assert why_not_opened(model_of([node(op, inputs, "y")], kind=F32)) is None


def falcon_alibi(dtype=torch.float32):
    torch.manual_seed(0)
    config = FalconConfig(**SMALL | {"num_hidden_layers": 1}, alibi=True, bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    """A float32 model whose alibi biases are rounded to bfloat16: its source and its graph."""
    folder = save_sparse(tmp_path_factory.mktemp("falcon") / "sparse", falcon_alibi())
    return open_source(folder), model_writer.build_graph(hollow_model(folder), with_past=False)


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """The same in float64, which onnxruntime has no Erf for."""
    folder = save_sparse(tmp_path_factory.mktemp("double") / "sparse", falcon_alibi(torch.float64))
    return open_source(folder), model_writer.build_graph(hollow_model(folder), with_past=False)


def check_run_as_shipped(checks, folder, path):
    assert (checks["shipped_file"], checks["computed_in"]) == ("run", "float32")
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = logits_of(AutoModelForCausalLM.from_pretrained(folder).eval())
    found = compare_logits(path, reference, VOCABULARY, tolerance=1e-5, batches=BATCHES)
    assert found.argmax_agreement == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_rounds_to_bfloat16_here_and_there_is_run_as_shipped(
    falcon, tmp_path, format, monkeypatch
):
    checks = write_graph(*falcon, tmp_path / "out", format, monkeypatch)
    check_run_as_shipped(checks, falcon[0].folder.path, tmp_path / "out" / "model.onnx")


@pytest.mark.nightly
def test_it_is_with_a_cache_as_well(falcon, tmp_path):
    folder = falcon[0].folder.path
    done = export(folder, tmp_path / "out", "onnx-packed", with_past=True)
    check_run_as_shipped(done.checks, folder, tmp_path / "out" / "model.onnx")


@pytest.fixture
def nothing_written(monkeypatch):
    def begin(*args):
        raise AssertionError("writing was begun")

    monkeypatch.setattr(model_writer, "_write_graph", begin)
    monkeypatch.setattr(model_writer, "COMPARED_BELOW", 0)


@pytest.mark.parametrize("format", FORMATS)
def test_what_onnxruntime_cannot_run_is_refused_before_anything_is_written(
    double, tmp_path, nothing_written, format, monkeypatch
):
    with pytest.raises(SppFxError, match=r"onnxruntime cannot run .* so nothing is written: .*Erf"):
        write_graph(*double, tmp_path / "out", format, monkeypatch)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_nodes_of_a_format_are_tried_before_anything_is_written(
    falcon, tmp_path, nothing_written, monkeypatch
):
    def unpack(self, parameter):
        name = parameter.name
        return [node("Erf", f"{name}.codes", name)]

    monkeypatch.setattr("spp_fx.exporters.onnx.encodings.PackedCodes._unpack", unpack)
    with pytest.raises(SppFxError, match=r"so nothing is written: .*Erf"):
        write_graph(*falcon, tmp_path / "out", "onnx-packed", monkeypatch)


def test_a_large_model_is_opened_and_not_run(falcon, tmp_path, monkeypatch):
    monkeypatch.setattr(model_writer, "COMPARED_BELOW", 0)
    opened = []
    monkeypatch.setattr(
        model_writer, "why_not_opened", lambda model: opened.append(model) or why_not_opened(model)
    )
    checks = write_graph(*falcon, tmp_path / "out", "onnx-dense", monkeypatch)
    assert len(opened) == 1
    assert checks["shipped_file"] == "not run: its graph was opened without the weights"


def test_a_model_in_bfloat16_says_that_its_file_was_not_run(tmp_path):
    folder = save_sparse(tmp_path / "sparse", falcon_alibi(torch.bfloat16))
    result = must("export", folder, "--format", "onnx-packed", "-o", tmp_path / "out", "--json")
    assert "onnxruntime has no bfloat16 on a CPU, there the graph does not run" in result.err
    checks = result.json["checks"]
    assert checks["computed_in"] == "float32 twin; onnxruntime has no bfloat16 on a CPU"
    assert checks["shipped_file"] == "not run: onnxruntime has no bfloat16 on a CPU"
    path = tmp_path / "out" / "model.onnx"
    with pytest.raises(SppFxError, match=r"onnxruntime cannot load the model: .*NOT_IMPLEMENTED"):
        OnnxModel(path)
    assert OnnxModel(path, twin=True).has_past is False
    assert {t.data_type for t in onnx.load(path).graph.initializer if t.name.endswith(".values")} == {BF16}
