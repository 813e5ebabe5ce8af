"""What fuzzing found, one test each."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST, sha256
from spp_fx.sparsity.lock import LOCK_NAME, load_lock
from spp_fx.verbs.verify import verify


@pytest.fixture
def damaged(artifacts, tmp_path):
    """A copy of an artifact: (kind) -> what verify is given."""

    def copy(kind: str):
        shutil.copytree(artifacts[kind].root, tmp_path / "copy")
        return artifacts[kind].at(tmp_path / "copy").path

    return copy


def edit_graph(folder, change) -> None:
    """Change a graph, and give export.json its new digest."""
    path = folder / "model.onnx"
    model = onnx.ModelProto.FromString(path.read_bytes())
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["model.onnx"] = sha256(path)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_packed_values_of_another_type_than_their_background(damaged):
    export = damaged("onnx-packed")

    def change(graph):
        values = next(t for t in graph.initializer if t.name.endswith(".values"))
        values.data_type = TensorProto.INT32

    edit_graph(export, change)
    with pytest.raises(FormatError, match="values of int32"):
        verify(export)


def test_a_node_that_makes_what_an_initializer_is(damaged):
    export = damaged("onnx-dense")

    def change(graph):
        graph.node[0].output[0] = graph.initializer[0].name

    edit_graph(export, change)
    with pytest.raises(FormatError, match="is made twice"):
        verify(export)


def test_a_tensor_that_is_a_segment(damaged):
    export = damaged("onnx")
    edit_graph(export, lambda graph: setattr(graph.sparse_initializer[0].values.segment, "begin", 1))
    with pytest.raises(FormatError, match="segment"):
        verify(export)


def test_a_background_in_another_file(damaged):
    export = damaged("onnx-packed")

    def change(graph):
        value = next(node for node in graph.node if node.op_type == "ConstantOfShape").attribute[0].t
        value.CopyFrom(numpy_helper.from_array(np.zeros(1, np.float32)))
        value.data_location = TensorProto.EXTERNAL
        value.external_data.add(key="location", value="../model.onnx")

    edit_graph(export, change)
    with pytest.raises(FormatError, match="has an attribute in another file"):
        verify(export)


def test_a_name_that_is_not_utf8(damaged):
    export = damaged("onnx-external")
    path = export / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"model.onnx.data", b"model.onnx.dat\xff"))
    manifest = json.loads((export / MANIFEST).read_text())
    manifest["files"]["model.onnx"] = sha256(path)
    (export / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="not UTF-8"):
        verify(export)


@pytest.mark.parametrize("kind", ["cusparselt", "adapter"])
def test_a_key_that_is_there_twice(damaged, kind):
    folder = damaged(kind)
    path = folder / ("adapter_config.json" if kind == "adapter" else MANIFEST)
    path.write_text('{"r": 1, "r": 2}')
    with pytest.raises(FormatError, match="'r' occurs twice"):
        verify(folder)


@pytest.mark.parametrize("kind", ["cusparselt", "adapter", "sharded"])
def test_a_json_file_larger_than_memory_is_not_read(damaged, kind):
    folder = damaged(kind)
    names = {
        "adapter": "adapter_config.json",
        "sharded": "model.safetensors.index.json",
        "cusparselt": MANIFEST,
    }
    os.truncate(folder / names[kind], 1 << 40)
    with pytest.raises(FormatError, match="the limit is"):
        verify(folder)


def test_an_onnx_file_larger_than_a_protobuf_is_not_read(damaged):
    path = damaged("lone-onnx")
    os.truncate(path, 1 << 40)
    with pytest.raises(FormatError, match="a protobuf is less"):
        verify(path)


def test_a_link_out_of_an_export(damaged, tmp_path):
    export = damaged("cusparselt")
    (export / "packed.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (export / "packed.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match=r"symbolic link .* outside of the folder"):
        verify(export)


def test_a_manifest_that_is_a_link_out_of_its_export(damaged, tmp_path):
    export = damaged("cusparselt")
    (export / MANIFEST).rename(tmp_path / MANIFEST)
    (export / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(FormatError, match="symbolic link"):
        verify(export)


def test_a_weight_file_of_an_export_that_is_a_pipe(damaged):
    export = damaged("cusparselt")
    os.mkfifo(export / "more.safetensors")
    with pytest.raises(FormatError, match=r"more\.safetensors has no digest"):
        verify(export)


def test_a_lock_that_is_a_pipe_is_not_waited_for(damaged, tmp_path):
    os.mkfifo(tmp_path / "lock.json")
    with pytest.raises(UsageError, match="is not a regular file"):
        verify(damaged("lone"), lock=tmp_path / "lock.json")


def test_a_file_that_is_no_lock_says_what_a_lock_is(damaged):
    model = damaged("model")
    with pytest.raises(FormatError, match=r"config\.json: not a valid lock.*spp-fx lock MODEL"):
        verify(model, lock=model / "config.json")


def test_a_name_with_a_line_end_makes_no_second_line(damaged):
    folder = damaged("adapter")
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | {"base_model_name_or_path": "a\n::error::b\x1b[31m"}
    path.write_text(json.dumps(content))
    with pytest.raises(SppFxError) as refused:
        verify(folder)
    assert "\\n::error::b\\x1b[31m" in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_site_of_a_lock_is_named_in_one_line(artifacts, tmp_path):
    text = artifacts["lone"].lock.read_text().replace('"w0.weight"', '"w0\\n::error::x"')
    (tmp_path / LOCK_NAME).write_text(text)
    with pytest.raises(FormatError, match=r"sites\[0\]\.name"):
        load_lock(tmp_path / LOCK_NAME)
