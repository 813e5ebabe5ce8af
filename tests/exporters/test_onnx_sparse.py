"""Sparse initializers: what is written is what onnxruntime, the checker and the reader see."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.exporters.onnx import sparse
from spp_fx.exporters.onnx.data import TYPES
from spp_fx.exporters.onnx.graph import GraphParameter
from spp_fx.exporters.onnx.reader import OnnxFile, load_sparse_masks
from spp_fx.exporters.onnx.sparse import SparseInitializers, index_type_for, take_apart
from tests.effort import examples
from tests.exporters.onnx_files import bits, product, read_back, sites_of, two_of_four, write_sparse


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "index_type"),
    [((8, 16), "int8"), ((256, 128), "int16"), ((256, 132), "int32"), ((256, 132), "int64")],
)
def test_onnxruntime_and_the_reader_see_the_weight_bit_for_bit(tmp_path, shape, index_type, dtype, external):
    weight = two_of_four(shape, dtype)
    path = tmp_path / "model.onnx"
    done = write_sparse(path, weight, "int64" if index_type == "int64" else "smallest", external)
    assert done.details["index_type"] == index_type
    assert (tmp_path / "model.onnx.data").is_file() == external
    if index_type == "int64" and not external:  # the checker cannot follow indices into external data
        onnx.checker.check_model(str(path))
    np.testing.assert_array_equal(product(path, shape[1]), weight.float().numpy().T)
    assert bits(read_back(path)) == bits(weight)
    (entry,) = load_sparse_masks(path)
    assert (entry.index_dtype, entry.shape) == (index_type, shape)
    np.testing.assert_array_equal(entry.mask(), (weight != 0).numpy())


def test_external_data_holds_the_large_tensors_only(tmp_path):
    write_sparse(tmp_path / "m.onnx", two_of_four((4, 8)), external=True)
    file = OnnxFile(tmp_path / "m.onnx")
    assert not file.sparse["W"].values.external_data
    write_sparse(tmp_path / "n.onnx", two_of_four((64, 128)), external=True)
    assert OnnxFile(tmp_path / "n.onnx").sparse["W"].values.external_data


@examples(10)
@given(
    st.integers(0, 9),
    st.integers(0, 40),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_values_and_positions_are_the_weight(rows, columns, dtype, density, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns, dtype.itemsize), dtype=np.uint8)  # any bits, NaN payloads too
    raw[rng.random((rows, columns)) >= density] = 0
    weight = torch.from_numpy(raw.view(f"u{dtype.itemsize}").reshape(rows, columns).copy()).view(dtype)
    values, positions = take_apart(weight, "int32")
    flat = np.zeros(rows * columns, dtype=values.dtype)
    flat[positions] = values
    assert flat.tobytes() == raw.tobytes()
    assert (np.diff(positions) > 0).all()
    assert (values != 0).all()


def test_a_zero_of_negative_sign_keeps_it(tmp_path):
    weight = two_of_four((8, 16))
    weight[2, 4] = -0.0
    weight[3, 5] = torch.finfo(torch.float32).smallest_normal / 4
    write_sparse(tmp_path / "m.onnx", weight)
    assert bits(read_back(tmp_path / "m.onnx")) == bits(weight)
    (entry,) = load_sparse_masks(tmp_path / "m.onnx")
    np.testing.assert_array_equal(entry.mask(), (weight != 0).numpy())


def test_an_all_zero_weight_is_sparse_with_no_values(tmp_path):
    weight = torch.zeros(8, 16)
    write_sparse(tmp_path / "m.onnx", weight)
    np.testing.assert_array_equal(product(tmp_path / "m.onnx", 16), weight.numpy().T)
    assert bits(read_back(tmp_path / "m.onnx")) == bits(weight)


def test_what_cannot_be_sparse_says_why(monkeypatch):
    full = torch.ones(8, 16)
    parameter = GraphParameter("W", (8, 16), TYPES[torch.float32])
    encoding = SparseInitializers("smallest")
    assert encoding.refusal(parameter, sites_of(full, "50%")) == "it holds no zero"
    assert encoding.refusal(parameter, sites_of(two_of_four((8, 16)), "2:4")) is None
    monkeypatch.setattr(sparse, "TENSOR_LIMIT", 512)
    assert "it takes 512 bytes" in str(encoding.refusal(parameter, sites_of(two_of_four((8, 16)), "2:4")))


@pytest.mark.parametrize(
    ("numel", "index_type"),
    [(128, "int8"), (129, "int16"), (2**15, "int16"), (2**15 + 1, "int32"), (2**31 + 1, "int64")],
)
def test_the_smallest_index_type_holds_the_last_position(numel, index_type):
    assert index_type_for(numel) == index_type
    assert numel - 1 <= np.iinfo(index_type).max


@pytest.mark.parametrize(
    ("dtype", "indices", "ratio"),
    [
        (torch.float32, "int64", 1.5),
        (torch.float16, "int64", 2.5),
        (torch.float32, "smallest", 1.0),
        (torch.float16, "smallest", 1.5),
    ],
)
def test_the_size_is_known_before(dtype, indices, ratio):
    weight = two_of_four((256, 256), dtype)
    parameter = GraphParameter("W", (256, 256), TYPES[dtype])
    assert SparseInitializers(indices).size(parameter, sites_of(weight, "2:4")) == ratio * weight.nbytes
