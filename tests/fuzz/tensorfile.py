"""safetensors files taken apart by hand, damaged in what they mean, and put together again."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz import jsonish

Header = dict[str, Any]
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E5M2",
    "F8_E4M3",
    "I8",
    "U8",
    "BOOL",
    "I64",
    "F4",
    "F6_E2M3",
    "C64",
    "X",
)


def split(data: bytes) -> tuple[Header, bytes]:
    """Header and tensor bytes of a sound file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: str, body: bytes) -> bytes:
    """A file of a header's text and its bytes, the text padded as writers do."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def mutate(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A changed file, and what was done to it."""
    header, body = split(data)
    if rng.random() < 0.45:
        text, what = jsonish.mutate(rng, json.dumps(header))
        return join(text, body), f"header: {what}"
    operation = rng.choice(OPERATIONS)
    name = rng.choice([name for name in header if name != "__metadata__"])
    body = operation(rng, header, name, body) or body
    return join(json.dumps(header), body), f"{operation.__name__[1:]} of {name}"


def mutate_inner(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A sparse-bitmask file whose metadata says something else of the model's file."""
    header, body = split(data)
    text, what = jsonish.mutate(rng, header["__metadata__"]["header"])
    header["__metadata__"]["header"] = text
    return join(json.dumps(header), body), f"inner header: {what}"


def _others(header: Header, name: str) -> list[str]:
    return [other for other in header if other not in (name, "__metadata__")]


def _overlap(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    """Its bytes are those of another tensor as well."""
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    start = rng.choice([0, max(0, header[name]["data_offsets"][0] - rng.choice([1, 2, 8, size]))])
    header[name]["data_offsets"] = [start, start + size]
    return None


def _alias(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    header[f"{name}.alias"] = dict(header[name])
    return None


def _gap(rng: Random, header: Header, name: str, body: bytes) -> bytes:
    """Bytes that belong to nobody."""
    at, room = header[name]["data_offsets"][0], rng.choice([1, 8, 64])
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [offset + room for offset in entry["data_offsets"]]
    return body[:at] + b"\0" * room + body[at:]


def _dtype(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    header[name]["dtype"] = rng.choice(DTYPES)
    return None


def _dtype_of_same_width(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    same = {
        "F16": ["BF16", "I16", "U16"],
        "BF16": ["F16"],
        "F32": ["I32"],
        "F64": ["I64", "C64"],
        "I8": ["F8_E5M2"],
    }
    header[name]["dtype"] = rng.choice(same.get(header[name]["dtype"], ["F16"]))
    return None


def _shape_of_same_bytes(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    shape = header[name]["shape"]
    numel = 1
    for size in shape:
        numel *= size
    choices = [shape[::-1], [numel], [1, *shape], [numel, 1], [1, numel], [*shape, 1], [1] * 65 + shape]
    if shape and shape[0] % 2 == 0:
        choices += [
            [shape[0] // 2, 2, *shape[1:]],
            [shape[0] // 2, *[2 * size for size in shape[1:2]], *shape[2:]],
        ]
    header[name]["shape"] = rng.choice(choices)
    return None


def _huge_shape(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    header[name]["shape"] = rng.choice(
        [[2**40, 2**40], [2**63], [0, 2**63], [0], [2**32, 2**31, 0], [-1, -1], []]
    )
    return None


def _swap(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    """Two tensors of one form change places."""
    form = header[name]["dtype"], header[name]["shape"]
    same = [n for n in _others(header, name) if (header[n]["dtype"], header[n]["shape"]) == form]
    other = rng.choice(same or _others(header, name) or [name])
    header[name]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[name]["data_offsets"],
    )
    return None


def _rename(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    others = _others(header, name) or [name]
    new = rng.choice([name + "x", name.upper(), "", "__metadata__", rng.choice(others) + ".bitmask", "\n"])
    header[new] = header.pop(name)
    return None


def _remove(rng: Random, header: Header, name: str, body: bytes) -> bytes:
    """The tensor is gone, and its bytes with it."""
    start, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return body[:start] + body[end:]


def _shorter(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    """A row less in shape and offsets, the bytes left where they are."""
    entry = header[name]
    if entry["shape"] and entry["shape"][0] > 1:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = [start, end - (end - start) // entry["shape"][0]]
        entry["shape"] = [entry["shape"][0] - 1, *entry["shape"][1:]]
    return None


def _offsets(rng: Random, header: Header, name: str, body: bytes) -> bytes | None:
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = rng.choice(
        [
            [end, start],
            [start, end, end],
            [start],
            [-1, end],
            [start, 2**63],
            [2**64, 2**65],
            [start, float(end)],
        ]
    )
    return None


def _shift_all(rng: Random, header: Header, name: str, body: bytes) -> bytes:
    """Every offset holds, the bytes begin elsewhere."""
    return rng.choice([body[1:] + body[:1], body[2:] + body[:2], b"\0" + body[:-1]])


OPERATIONS: tuple[Callable[[Random, Header, str, bytes], bytes | None], ...] = (
    _overlap,
    _alias,
    _gap,
    _dtype,
    _dtype_of_same_width,
    _shape_of_same_bytes,
    _huge_shape,
    _swap,
    _swap,
    _rename,
    _remove,
    _shorter,
    _offsets,
    _shift_all,
)
