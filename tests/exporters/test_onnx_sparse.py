"""Sparse initializers: what is written is what onnxruntime, the checker and the reader see."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from spp_fx.exporters.onnx import encodings
from spp_fx.exporters.onnx.encodings import SparseInitializers, index_type_for, nonzeros
from spp_fx.exporters.onnx.onnx_file import OnnxFile
from tests.effort import examples
from tests.exporters.onnx_files import bits, product, read_back, sites_of, two_of_four, write_sparse


def stored(file: OnnxFile) -> list[np.ndarray]:
    sparse = file.sparse["W"]
    return [file.read_stored("W", tensor) for tensor in (sparse.values, sparse.indices)]


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
    file = OnnxFile(path)
    assert helper.tensor_dtype_to_np_dtype(file.sparse["W"].indices.data_type) == index_type
    values, positions = stored(file)
    np.testing.assert_array_equal(positions, np.flatnonzero(weight.float()))
    assert (values != 0).all()


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
    values, positions = nonzeros(weight, "int32")
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
    values, _ = stored(OnnxFile(tmp_path / "m.onnx"))
    assert len(values) == (weight != 0).sum() + 1


def test_an_all_zero_weight_is_sparse_with_no_values(tmp_path):
    weight = torch.zeros(8, 16)
    write_sparse(tmp_path / "m.onnx", weight)
    np.testing.assert_array_equal(product(tmp_path / "m.onnx", 16), weight.numpy().T)
    assert bits(read_back(tmp_path / "m.onnx")) == bits(weight)


def test_what_cannot_be_sparse_says_why(monkeypatch):
    full = torch.ones(8, 16)
    encoding, sites = SparseInitializers("smallest"), sites_of(two_of_four((8, 16)), "2:4")
    assert encoding.why_dense(sites_of(full, "50%")) == "it holds no zero"
    assert encoding.why_dense(sites) is None
    monkeypatch.setattr(encodings, "TENSOR_LIMIT", 512)
    assert "it takes 512 bytes" in str(encoding.why_dense(sites))


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
    assert SparseInitializers(indices).size(sites_of(weight, "2:4")) == ratio * weight.nbytes
