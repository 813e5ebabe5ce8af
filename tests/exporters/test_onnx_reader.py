"""Reading .onnx files back: a file that lies is refused with its reason."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.onnx.onnx_file import OnnxFile
from tests.exporters.onnx_files import two_of_four, write_sparse


def read(path):
    file = OnnxFile(path)
    return {name: file.read(name) for name in (*file.dense, *file.sparse)}


def written(tmp_path, change=lambda sparse: None, external=False):
    """A 64 x 64 sparse W whose SparseTensorProto `change` spoils."""
    path = tmp_path / "model.onnx"
    write_sparse(path, two_of_four((64, 64)), "int64", external)
    model = onnx.load(str(path), load_external_data=False)
    change(model.graph.sparse_initializer[0])
    path.write_bytes(model.SerializeToString())
    return path


def set_indices(edit):
    def change(sparse):
        indices = np.frombuffer(sparse.indices.raw_data, np.int64).copy()
        edit(indices)
        sparse.indices.raw_data = indices.tobytes()

    return change


def swap(indices):
    indices[[3, 4]] = indices[[4, 3]]


def repeat(indices):
    indices[4] = indices[3]


def beyond(indices):
    indices[-1] = 64 * 64


def negative(indices):
    indices[0] = -1


@pytest.mark.parametrize(
    ("edit", "message"),
    [(swap, "ascend"), (repeat, "ascend"), (beyond, "outside 0..4095"), (negative, "outside 0..4095")],
)
def test_bad_indices_are_refused(tmp_path, edit, message):
    with pytest.raises(FormatError, match=rf"^W \(.*{message}"):
        read(written(tmp_path, set_indices(edit)))


def cut_values(sparse):
    sparse.values.raw_data = sparse.values.raw_data[:-4]


def fewer_indices(sparse):
    sparse.indices.raw_data = sparse.indices.raw_data[:-8]
    sparse.indices.dims[0] -= 1


def float_indices(sparse):
    sparse.indices.data_type = TensorProto.DOUBLE


def no_name(sparse):
    sparse.values.name = ""


def unknown_type(sparse):
    sparse.values.data_type = 999


def empty_shape(sparse):
    del sparse.dims[:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_values, "needs 8192"),
        (fewer_indices, r"\[2048\] values but \[2047\] indices"),
        (float_indices, "indices have type 11"),
        (no_name, "has no name"),
        (unknown_type, "unknown data type 999"),
        (empty_shape, "not the shape of a sparse tensor"),
    ],
)
def test_inconsistent_tensors_are_refused(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        read(written(tmp_path, change))


def reference(key, value):
    def change(sparse):
        next(entry for entry in sparse.values.external_data if entry.key == key).value = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../secret.bin", "not inside the model's folder"),
        ("location", "/etc/hostname", "not inside the model's folder"),
        ("location", "link.bin", "not inside the model's folder"),
        ("location", "", "without a file name"),
        ("location", "gone.data", "gone.data is missing"),
        ("offset", "1000000", "truncated"),
        ("offset", "-8", "not a number"),
        ("length", "4", "needs 8192"),
    ],
)
def test_external_data_is_not_believed(tmp_path, key, value, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(8192))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(FormatError, match=rf"^W .*{message}"):
        read(written(folder, reference(key, value), external=True))


def test_truncated_external_data_is_refused(tmp_path):
    path = written(tmp_path, external=True)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"^W \(.*indices: model.onnx.data is truncated"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(100)])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(FormatError, match="not an ONNX model"):
        read(tmp_path / "m.onnx")


def test_a_truncated_model_is_refused(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="not an ONNX model"):
        read(path)


def test_a_name_used_twice_is_refused(tmp_path):
    path = written(tmp_path)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "W"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="two initializers have this name"):
        read(tmp_path / "m.onnx")


def test_indices_as_coordinates_are_read_as_well(tmp_path):
    weight = two_of_four((64, 64)).numpy()

    def as_coordinates(sparse):
        del sparse.dims[:]
        sparse.dims.extend(weight.shape)
        coordinates = np.argwhere(weight).astype(np.int64)
        sparse.values.CopyFrom(numpy_helper.from_array(weight[weight != 0], "W"))
        sparse.indices.CopyFrom(numpy_helper.from_array(coordinates))

    path = written(tmp_path, as_coordinates)
    onnx.checker.check_model(str(path))
    np.testing.assert_array_equal(read(path)["W"], weight)


def test_a_missing_file_is_a_wrong_request(tmp_path):
    with pytest.raises(UsageError, match=r"nothere\.onnx: there is no such file"):
        OnnxFile(tmp_path / "nothere.onnx")
