import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.safetensors import Shard, read_header
from tests.effort import examples

Put = Callable[..., Path]


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


F32 = entry("F32", [2], 0, 8)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4)}, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b"]  # widest dtype first
    assert header.tensors["b"].dtype == "BF16"
    assert header.tensors["b"].shape == (2, 3)
    assert header.tensors["b"].nbytes == 12
    assert header.data_start == len(header.raw)
    assert header.raw == path.read_bytes()[: header.data_start]
    assert header.data_end == path.stat().st_size


def test_a_file_without_tensors_is_whole(tmp_path: Path, put: Put) -> None:
    header = read_header(put(tmp_path / "m.safetensors", {}))
    assert header.tensors == {}
    assert header.data_end == 10


DAMAGE: dict[str, tuple[object, bytes, str]] = {
    "not json": (b"{'a': 1}", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "does not start with '{'"),
    "leading space": (b" {}", b"", "does not start with '{'"),
    "two objects": (b"{} {}", b"", "not valid JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN is not JSON"),
    "endless integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "nested too deep"),
    "key twice": (
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b"x",
        "the key 'a' occurs twice",
    ),
    "dtype twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}',
        b"x",
        "'dtype' occurs twice",
    ),
    "metadata a list": ({"__metadata__": []}, b"", "__metadata__ is [], expected an object"),
    "metadata not text": ({"__metadata__": {"k": 1}}, b"", "key 'k' holds 1, expected a string"),
    "metadata not unicode": (b'{"__metadata__": {"k": "\\ud800"}}', b"", "not Unicode"),
    "name not unicode": (b'{"\\ud800": 1}', b"", "not Unicode"),
    "entry not an object": ({"a": 3}, b"", "tensor 'a': its entry is 3"),
    "entry without dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x", "expected dtype, shape and"),
    "entry with more": ({"a": {**F32, "stride": [1]}}, bytes(8), "expected dtype, shape and"),
    "unknown dtype": ({"a": entry("F7", [1], 0, 1)}, b"x", "tensor 'a': unknown dtype 'F7'"),
    "dtype not text": ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "unknown dtype"),
    "negative dimension": ({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8), "shape holds -2"),
    "huge dimension": ({"a": entry("U8", [2**63], 0, 8)}, bytes(8), "shape holds 9223372036854775808"),
    "huge product": ({"a": entry("U8", [2**40, 2**40], 0, 8)}, bytes(8), "more than 2**63 - 1 elements"),
    "huge beside zero": ({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}, b"", "more than 2**63 - 1 elements"),
    "fractional dimension": ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "shape holds 2.0"),
    "true dimension": ({"a": entry("U8", [True], 0, 1)}, b"x", "shape holds True"),
    "shape a number": ({"a": {**F32, "shape": 2}}, bytes(8), "shape is 2"),
    "65 dimensions": ({"a": entry("U8", [1] * 65, 0, 1)}, b"x", "has 65 dimensions"),
    "offsets backwards": ({"a": entry("F32", [2], 8, 0)}, bytes(8), "not a start and an end"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8), "not a start and an end"),
    "size not shape": ({"a": entry("F32", [3], 0, 8)}, bytes(8), "F32 of shape [3] takes 12 bytes"),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, b"x", "does not end on a whole byte"),
    "overlap": ({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12), "overlap those of tensor 'a' by 4"),
    "same bytes": ({"a": F32, "b": F32}, bytes(8), "overlap those of tensor 'a' by 8"),
    "empty inside": ({"a": F32, "e": entry("F32", [0], 4, 4)}, bytes(8), "overlap those of tensor 'a'"),
    "gap": ({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20), "tensor 'b': 4 bytes between it and"),
    "gap in front": ({"a": entry("F32", [2], 4, 12)}, bytes(12), "between it and the header"),
    "truncated": ({"a": F32, "b": entry("F32", [2], 8, 16)}, bytes(13), "truncated: 3 of"),
    "data behind": ({"a": F32}, bytes(11), "3 bytes after tensor 'a' belong to no tensor"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_refused_with_file_and_fault(fault: str, tmp_path: Path, put: Put) -> None:
    header, data, message = DAMAGE[fault]
    path = put(tmp_path / "m.safetensors", header, data)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_truncation_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}, path)
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(FormatError, match=r"truncated: 20 of \d+ bytes are missing, from tensor 'b' on"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long"),
        (b"1234567", "is 7 bytes long"),
        (struct.pack("<Q", 100_000_001) + b"{}", "claims a header of 100000001 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "claims a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 50) + b"{}", "the header needs 48 more bytes"),
        (struct.pack("<Q", 0), "does not start with '{'"),
    ],
)
def test_impossible_lengths(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_header(path)


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "absent", "no such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "a\0b", "cannot be read"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_header(path)


def test_long_hostile_names_stay_short_in_messages(tmp_path: Path, put: Put) -> None:
    path = put(tmp_path / "m.safetensors", {"\x1b[31m" * 10_000: 1})
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 2000
    assert "\x1b" not in str(caught.value)


def read_or_refuse(path: Path) -> None:
    """Read every tensor, or fail as a user can understand; any other exception fails the test."""
    refusal: SppFxError | None = None
    try:
        shard = Shard.open(path)
        for name in shard.header.tensors:
            shard.read(name)
    except SppFxError as error:
        refusal = error
    assert refusal is None or str(path) in str(refusal)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "BOOL", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), max_size=3) | json_values,
    }
)
headers: st.SearchStrategy[Any] = (
    st.binary(max_size=80)
    | st.binary(max_size=80).map(lambda tail: b"{" + tail)
    | json_values
    | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)
)


@examples(75)
@given(
    header=headers,
    data=st.binary(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 90),
)
def test_any_header_is_read_or_refused(
    tmp_path: Path, put: Put, header: object, data: bytes, length: int | None
) -> None:
    read_or_refuse(put(tmp_path / "m.safetensors", header, data, length))


@examples(75)
@given(data=st.data())
def test_a_damaged_real_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bool)}, whole, {"format": "pt"})
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refuse(path)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(FormatError, match=r"is a Git LFS pointer, .* 'git lfs pull'"):
        read_header(path)
