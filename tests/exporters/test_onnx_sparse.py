"""Sparse initializers: what is written is what onnxruntime, the checker and the reader see."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from onnx import TensorProto, helper, numpy_helper

from spp_fx.errors import SppFxError
from spp_fx.exporters import onnx_sparse
from spp_fx.exporters.onnx_reader import DenseInitializer, SparseInitializer, load_sparse_masks
from spp_fx.exporters.onnx_sparse import (
    index_type_for,
    save,
    size_report,
    sparsify,
)


def two_of_four(shape, dtype=np.float32, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    weight.reshape(-1, 4)[:, [0, 3]] = 0
    return weight


def matmul_model(weight, **others):
    """Y = X @ W in float32, W of any type, and other initializers nothing reads."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["W"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["X", "wide"], ["Y"]),
        ],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(array, name) for name, array in {"W": weight, **others}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(path, rows):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": np.eye(rows, dtype=np.float32)})[0]


def read(path):
    return {entry.name: entry for entry in load_sparse_masks(path)}


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize(
    ("shape", "index_type"),
    [((8, 16), "int8"), ((256, 128), "int16"), ((256, 132), "int32"), ((256, 132), "int64")],
)
def test_onnxruntime_and_the_reader_see_the_weight_bit_for_bit(tmp_path, shape, index_type, dtype, external):
    weight = two_of_four(shape, dtype)
    model, (report,) = sparsify(matmul_model(weight), ["W"], "int64" if index_type == "int64" else "smallest")
    assert report.index_type == index_type
    files = save(model, tmp_path / "model.onnx", external_threshold=0 if external else 2**30)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"][: 2 if external else 1]
    if index_type == "int64" and not external:  # the checker cannot follow indices into external data
        onnx.checker.check_model(str(tmp_path / "model.onnx"))

    np.testing.assert_array_equal(run(tmp_path / "model.onnx", shape[0]), weight.astype(np.float32))
    entry = read(tmp_path / "model.onnx")["W"]
    assert (entry.index_dtype, entry.dtype, entry.shape) == (index_type, np.dtype(dtype).name, shape)
    np.testing.assert_array_equal(entry.mask(), weight != 0)
    assert entry.dense().tobytes() == weight.tobytes()


def test_external_data_holds_the_large_tensors_only(tmp_path):
    weight = two_of_four((256, 132))
    model, _ = sparsify(matmul_model(weight, bias=np.arange(8.0)), ["W"], "int64")
    save(model, tmp_path / "model.onnx", external_threshold=1000)
    assert (tmp_path / "model.onnx").stat().st_size < 2000
    assert (tmp_path / "model.onnx.data").stat().st_size == weight.size // 2 * (4 + 8)
    assert model.graph.sparse_initializer[0].values.raw_data, "the argument is left as it was"


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    density=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([np.float32, np.float16, bfloat16]),
)
@settings(max_examples=30, deadline=None)
def test_the_mask_read_back_is_the_mask_of_the_weight(tmp_path_factory, rows, columns, density, seed, dtype):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(dtype)
    weight[rng.random((rows, columns)) >= density] = 0
    model, (report,) = sparsify(matmul_model(weight), ["W"])
    path = tmp_path_factory.mktemp("m") / "model.onnx"
    save(model, path)
    entry = read(path)["W"]
    mask = entry.mask() if isinstance(entry, SparseInitializer) else entry.array != 0
    np.testing.assert_array_equal(mask, weight != 0)
    assert report.nnz == np.count_nonzero(weight)


def test_odd_values_keep_their_bits_and_minus_zero_is_a_zero(tmp_path):
    weight = np.array([[np.nan, -0.0, np.inf, 1e-45, 0.0, -1e-45, 0.0, 2.0]], dtype=np.float32)
    model, (report,) = sparsify(matmul_model(weight), ["W"])
    save(model, tmp_path / "m.onnx")
    entry = read(tmp_path / "m.onnx")["W"]
    assert report.nnz == 5
    assert entry.indices.tolist() == [0, 2, 3, 5, 7]
    assert entry.values.tobytes() == weight[0, [0, 2, 3, 5, 7]].tobytes()


def test_an_all_zero_weight_is_sparse_with_no_values(tmp_path):
    model, (report,) = sparsify(matmul_model(np.zeros((8, 8), np.float32)), ["W"], "int64")
    save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    assert report.sparse_bytes == 0
    assert not run(tmp_path / "m.onnx", 8).any()
    assert not read(tmp_path / "m.onnx")["W"].mask().any()


def test_expert_stacks_are_converted_too(tmp_path):
    stack = two_of_four((3, 8, 8))
    model, _ = sparsify(matmul_model(two_of_four((8, 8)), experts=stack), ["experts"])
    save(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(read(tmp_path / "m.onnx")["experts"].dense(), stack)


def test_what_cannot_be_sparse_stays_dense_with_a_reason(tmp_path, monkeypatch):
    weight = two_of_four((8, 8))
    model = matmul_model(weight, full=np.ones((4, 4), np.float32), ints=np.eye(4, dtype=np.int64))
    names = ["W", "full", "ints"]
    _, reports = sparsify(model, names)
    assert [report.reason is None for report in reports] == [True, False, False]
    assert "holds no zero" in reports[1].reason
    assert "int64" in reports[2].reason

    monkeypatch.setattr(onnx_sparse, "TENSOR_LIMIT", 256)
    result, (report, *_) = sparsify(model, names)
    assert "256 bytes" in report.reason
    assert size_report(result, [report]).left_dense == {"W": report.reason}
    save(result, tmp_path / "m.onnx")
    assert isinstance(read(tmp_path / "m.onnx")["W"], DenseInitializer)


def test_an_unknown_name_is_refused():
    with pytest.raises(SppFxError, match="V is no dense initializer"):
        sparsify(matmul_model(two_of_four((8, 8))), ["V"])


@pytest.mark.parametrize(
    ("numel", "index_type"),
    [(128, "int8"), (129, "int16"), (2**15, "int16"), (2**15 + 1, "int32"), (2**31, "int32")],
)
def test_the_smallest_index_type_holds_the_last_position(numel, index_type):
    assert index_type_for(numel) == index_type
    assert np.iinfo(index_type).max >= numel - 1
    assert index_type_for(numel, "int64") == "int64"


@pytest.mark.parametrize(
    ("dtype", "indices", "ratio"),
    [
        (np.float32, "int64", 1.5),
        (np.float16, "int64", 2.5),
        (np.float32, "smallest", 1.0),
        (np.float16, "smallest", 1.5),
    ],
)
def test_the_size_report_says_what_grew(dtype, indices, ratio):
    weight = two_of_four((256, 132), dtype)  # more than 2^15 elements: int32 or int64
    model, reports = sparsify(matmul_model(weight), ["W"], indices)
    report = size_report(model, reports)
    assert report.sparse_bytes / report.dense_bytes == ratio
    assert report.larger == (("W",) if ratio > 1 else ())
    assert report.sparse_bytes == sum(
        len(s.values.raw_data) + len(s.indices.raw_data) for s in model.graph.sparse_initializer
    )


def test_the_size_report_counts_the_rest_of_the_model():
    model, reports = sparsify(matmul_model(two_of_four((8, 8)), other=np.ones(100, np.float32)), ["W"])
    report = size_report(model, reports)
    assert (report.other_bytes, report.dense_bytes, report.sparse_bytes) == (400, 656, 400 + 32 * 5)
