"""The parsers alone: whatever bytes or JSON they are given, they return or raise the project's errors."""

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.errors import FormatError, SppFxError, printable
from spp_fx.exporters.manifest import MANIFEST, read_manifest
from spp_fx.exporters.onnx.onnx_file import OnnxFile
from spp_fx.sparsity.lock import Lock, load_lock
from spp_fx.storage.folder import find_weights, within
from spp_fx.storage.safetensors import read_header
from spp_fx.storage.strict_json import parse_object
from tests.effort import examples

quick = examples(37)

texts = st.text(max_size=20) | st.sampled_from(
    ["\ud800", "\0", "..", "/etc/passwd", "x" * 300, "model.safetensors"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def objects(*keys: str) -> st.SearchStrategy[object]:
    """JSON-shaped values, most of them objects with the keys that a parser asks for."""
    entries = dict.fromkeys(keys, values)
    return values | st.fixed_dictionaries({}, optional=entries) | st.fixed_dictionaries(entries)


tensor = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F4", "BOOL", "X"]) | scalars,
        "shape": st.lists(st.integers(-1, 2**65), max_size=4) | scalars,
        "data_offsets": st.lists(st.integers(-1, 2**65), max_size=3) | scalars,
    },
)


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path


@quick
@given(data=st.binary(max_size=200))
@example(data=b"\xff" * 8)
@example(data=(2**63).to_bytes(8, "little") + b"{")
def test_any_bytes_are_a_header_or_refused(place, data):
    (place / "a.safetensors").write_bytes(data)
    with suppress(SppFxError):
        read_header(place / "a.safetensors")


@quick
@given(entries=st.dictionaries(texts, tensor | values, max_size=4), body=st.binary(max_size=40))
def test_a_header_that_is_taken_covers_its_file(place, entries, body):
    text = json.dumps(entries).encode()
    path = place / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with suppress(SppFxError):
        header = read_header(path)
        assert header.data_end == path.stat().st_size
        for info in header.tensors.values():
            assert header.data_start <= info.start <= info.end <= header.data_end


@quick
@given(data=st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()))
def test_json_that_is_taken_is_an_object_of_real_numbers(data):
    with suppress(FormatError):
        found = parse_object(data, "x")
        assert found == json.loads(data)
        assert not any(isinstance(value, float) and math.isnan(value) for value in found.values())


@quick
@given(content=objects("weight_map", "metadata"))
def test_an_index_leads_nowhere_else(place, content):
    (place / "model.safetensors.index.json").write_text(json.dumps(content))
    with suppress(SppFxError):
        for name in find_weights(place).names:
            assert (place / name).resolve().is_relative_to(place.resolve())


@quick
@given(name=texts | st.text(st.sampled_from("./\\:ab\0"), max_size=8))
def test_a_name_stays_in_its_folder(place, name):
    with suppress(FormatError):
        assert within(place, name).resolve().is_relative_to(place.resolve())


@quick
@given(content=objects("format_version", "pattern", "sites"))
def test_a_lock_that_is_taken_is_written_as_it_was_read(content):
    text = json.dumps(content)
    with suppress(FormatError):
        lock = Lock.loads(text)
        assert Lock.loads(lock.dumps()).by_name() == lock.by_name()


@quick
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_lock_or_refused(place, data):
    (place / "sparsity.lock.json").write_bytes(data)
    with pytest.raises(SppFxError):
        load_lock(place / "sparsity.lock.json")


@quick
@given(
    content=objects(
        "schema_version", "spp_fx_version", "format", "pattern", "requirements", "tensors", "sizes", "files"
    )
)
def test_a_manifest_names_only_files_that_are_there(place, content):
    (place / MANIFEST).write_text(json.dumps(content))
    with suppress(SppFxError):
        assert all((place / name).is_file() for name in read_manifest(place).files)


@quick
@given(content=objects("format_version", "peft_type", "method", "method_parameters", "r", "sites", "bias"))
def test_any_adapter_configuration_is_refused_without_its_factors(place, content):
    (place / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(SppFxError):
        AdapterFolder.open(place)


@quick
@given(data=st.binary(max_size=200))
@example(data=b"\x08\x08\x3a\x02\x0a\x00")
def test_any_bytes_are_a_graph_or_refused(place, data):
    (place / "a.onnx").write_bytes(data)
    with suppress(SppFxError):
        OnnxFile(place / "a.onnx")


@quick
@given(text=st.text() | texts)
def test_a_message_is_one_printable_line(text):
    line = printable(text * 50)
    assert len(line) <= 2000
    assert line.isprintable()
    line.encode()
