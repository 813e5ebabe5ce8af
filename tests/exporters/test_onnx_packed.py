"""onnx-packed: standard operators give the weight back, in every runtime, and lies about it are refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from spp_fx.errors import FormatError
from spp_fx.exporters.onnx.encodings import PackedCodes
from spp_fx.exporters.onnx.graph_writer import onnx_type
from tests.exporters.onnx_files import (
    bits,
    matmul_model,
    product,
    read_back,
    replace,
    sites_of,
    two_of_four,
    write_weight,
)

PATTERNS = ["2:4", "1:2", "1:4", "4:8", "2:8", "3:5", "8:16"]


def pruned(pattern: str, shape: tuple[int, ...], dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """A random weight that keeps up to N of M, with groups that keep fewer."""
    kept, group = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    groups = weight.view(-1, group)
    order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    groups[order >= kept] = 0
    groups[::7] = 0
    groups[3::7, 1:] = 0
    return weight


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"])
def test_onnxruntime_and_the_reader_unpack_it(tmp_path, pattern, level):
    weight = pruned(pattern, (32, int(pattern.split(":")[1]) * 6))
    write_weight(tmp_path / "m.onnx", weight, PackedCodes(), pattern)
    np.testing.assert_array_equal(product(tmp_path / "m.onnx", weight.shape[1], level), weight.numpy().T)
    assert bits(read_back(tmp_path / "m.onnx")) == bits(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_type_passes_the_checker_and_comes_back(tmp_path, dtype):
    weight = pruned("2:4", (16, 32), dtype)
    weight[0, 0:4] = torch.tensor([torch.finfo(dtype).smallest_normal / 2, 0, -0.0, 0])  # subnormal, -0.0
    done = write_weight(
        tmp_path / "m.onnx", weight, PackedCodes(), model=matmul_model(32, 16, onnx_type(dtype), opset=21)
    )
    assert done.negative_zeros == 0
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert bits(read_back(tmp_path / "m.onnx")) == bits(weight)
    np.testing.assert_array_equal(product(tmp_path / "m.onnx", 32), weight.float().numpy().T)


def test_the_standards_own_evaluator_agrees(tmp_path):
    weight = pruned("4:8", (16, 32))
    write_weight(tmp_path / "m.onnx", weight, PackedCodes(), "4:8")
    (result,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"X": np.eye(32, dtype=np.float32)})
    np.testing.assert_array_equal(result, weight.numpy().T)


def test_openvino_agrees(tmp_path):
    openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    weight = pruned("2:4", (16, 32))
    write_weight(tmp_path / "m.onnx", weight, PackedCodes())
    model = openvino.Core().compile_model(
        str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (result,) = model({"X": np.eye(32, dtype=np.float32)}).values()
    np.testing.assert_array_equal(result, weight.numpy().T)


def test_onnxruntime_folds_it_away(tmp_path):
    import onnxruntime

    write_weight(tmp_path / "m.onnx", two_of_four((32, 64)), PackedCodes())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == ["MatMul"]


def test_storage_the_other_way_round_and_stacks(tmp_path):
    stored = pruned("2:4", (64, 32)).T.contiguous()  # (in, out)
    write_weight(tmp_path / "t.onnx", stored, PackedCodes(), transposed=True)
    assert bits(read_back(tmp_path / "t.onnx")) == bits(stored)
    stack = pruned("2:4", (3, 8, 16))
    write_weight(tmp_path / "s.onnx", stack, PackedCodes())
    assert bits(read_back(tmp_path / "s.onnx")) == bits(stack)


@pytest.mark.parametrize(
    ("dtype", "pattern", "share"),
    [(torch.float16, "2:4", 0.5625), (torch.float32, "2:4", 0.53125), (torch.float16, "8:16", 0.5625)],
)
def test_the_size_is_known_before(dtype, pattern, share):
    weight = pruned(pattern, (64, 64), dtype)
    sites = sites_of(weight, pattern)
    assert PackedCodes().why_dense(sites) is None
    assert PackedCodes().size(sites) == share * weight.nbytes


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("40%", "40% is not packed, only N:M with M up to 16"),
        ("16:32", "16:32 is not packed"),
        ("15:16", "grow"),
    ],
)
def test_what_stays_dense_says_why(pattern, message):
    weight = torch.zeros(32, 32, dtype=torch.float16)
    if pattern == "15:16":  # three groups of int8: no two codes share a byte
        weight = weight[:3, :16].to(torch.int8)
    reason = PackedCodes().why_dense(sites_of(weight, pattern))
    assert reason is not None
    assert message in reason


def edit(name, change):
    def apply(proto):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        replace(proto, name, change(onnx.numpy_helper.to_array(tensor).copy()))

    return apply


def put(array, index, value):
    array[index] = value
    return array


def other_axis(proto):
    node = next(node for node in proto.graph.node if node.op_type == "ScatterElements")
    node.attribute[0].i = 0


def attribute(op_type, name, value):
    def apply(proto):
        node = next(node for node in proto.graph.node if node.op_type == op_type)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return apply


def without_inputs(op_type):
    def apply(proto):
        node = next(node for node in proto.graph.node if node.op_type == op_type)
        del node.input[0 if op_type != "ScatterElements" else 1 :]

    return apply


def other_source(proto):
    node = next(node for node in proto.graph.node if node.op_type == "ScatterElements")
    node.input[0] = "X"


def other_background(proto):
    node = next(node for node in proto.graph.node if node.op_type == "ConstantOfShape")
    node.attribute[0].t.CopyFrom(onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0]))


TABLE = "spp_fx.positions.2_4x2"


REFUSED = [
    (edit("W.codes", lambda a: put(a, 0, 255)), "Gather"),
    (edit("W.codes", lambda a: a[:-1]), "ScatterElements"),
    (edit("W.values", lambda a: a[:, :-1]), "ScatterElements"),
    (edit(TABLE, lambda a: put(a, (0, 0), 7)), "do not ascend within 8 columns"),
    (edit(TABLE, lambda a: put(a, (0, 3), 8)), "do not ascend within 8 columns"),
    (edit("W.runs", lambda a: put(a, 1, 10**12)), "ConstantOfShape"),
    (edit("W.runs", lambda a: put(a, 0, 3)), "ScatterElements"),
    (edit("W.shape", lambda a: put(a, 0, 17)), "Reshape"),
    (edit("W.runs", lambda a: a[0]), "ConstantOfShape"),
    (edit("W.runs", lambda a: a.astype(np.float32) * np.nan), "ConstantOfShape"),
    (edit("W.shape", lambda a: a[0]), "Reshape"),
    (edit(TABLE, lambda a: a.astype(np.float32) * np.nan), "positions of float32"),
    (edit("W.values", lambda a: a.astype(np.int32)), "values of int32"),
    (other_axis, "axis"),
    (attribute("ScatterElements", "reduction", "mul"), "reduction"),
    (attribute("Gather", "axis", 1), "Gather"),
    (without_inputs("Cast"), "Cast"),
    (without_inputs("Gather"), "Gather"),
    (without_inputs("ConstantOfShape"), "ConstantOfShape"),
    (without_inputs("ScatterElements"), "ScatterElements"),
    (other_source, "from a value that is not in the file"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_a_packing_that_cannot_be_computed_is_refused(tmp_path, damage, message):
    path = tmp_path / "m.onnx"
    write_weight(path, pruned("2:4", (16, 32)), PackedCodes())
    proto = onnx.load(path)
    damage(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(FormatError, match=rf"^W \(.*{message}"):
        read_back(path)


@pytest.mark.parametrize(
    "damage",
    [
        other_background,
        attribute("Reshape", "allowzero", 1),
        attribute("Cast", "to", onnx.TensorProto.BOOL),
        edit("W.codes", lambda a: a.astype(np.int8)),
        edit("W.codes", lambda a: put(a, 0, (a[0] + 1) % 36)),
    ],
)
def test_a_packing_is_what_the_standards_own_evaluator_makes_of_it(tmp_path, damage):
    path = tmp_path / "m.onnx"
    write_weight(path, pruned("2:4", (16, 32)), PackedCodes())
    proto = onnx.load(path)
    damage(proto)
    path.write_bytes(proto.SerializeToString())
    (expected,) = ReferenceEvaluator(proto).run(None, {"X": np.eye(32, dtype=np.float32)})
    np.testing.assert_array_equal(read_back(path).numpy().T, expected)
