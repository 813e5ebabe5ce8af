"""One stored number changed, and nothing else: what only a look at the numbers can find."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import TensorProto

from tests.fuzz.plain import FLOATS, WIDTHS
from tests.fuzz.tensorfile import join, split


def mutate(rng: Random, path: Path) -> tuple[str, bool]:
    """Change one element of one tensor of a .safetensors or .onnx file.

    Returns:
        What was changed, and whether it was a non-zero weight that became another finite one.
    """
    if path.suffix == ".onnx":
        return _in_graph(rng, path)
    header, body = split(path.read_bytes())
    names = [
        n
        for n, entry in header.items()
        if n != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]
    ]
    name = rng.choice([n for n in names if _is_weight(n)] or names)
    dtype, (start, end) = header[name]["dtype"], header[name]["data_offsets"]
    changed, what, at = _element(rng, body[start:end], dtype)
    path.write_bytes(join(json.dumps(header), body[:start] + changed + body[end:]))
    return f"{name}: {what}", at is not None and _is_value(name, at, header)


def _is_value(name: str, at: int, header: Mapping[str, Any]) -> bool:
    """Whether an element is an entry of the weight; others say where its entries lie."""
    if name.endswith(".packed") and f"{name.removesuffix('packed')}meta" not in header:
        return at < math.prod(header[name]["shape"]) // 9 * 8  # cuSPARSELt's metadata is the last ninth
    return not name.endswith(("bitmask", "positions", "meta", "shape"))


def _is_weight(name: str) -> bool:
    return "_proj" in name or name.startswith(("w", "experts", "h."))


def _in_graph(rng: Random, path: Path) -> tuple[str, bool]:
    types = {TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16"}
    model = onnx.ModelProto.FromString(path.read_bytes())
    tensors = [*model.graph.initializer, *(sparse.values for sparse in model.graph.sparse_initializer)]
    tensor = rng.choice([t for t in tensors if t.data_type in types and t.dims])
    dtype = types[tensor.data_type]
    if tensor.raw_data:
        tensor.raw_data, what, at = _element(rng, tensor.raw_data, dtype)
        path.write_bytes(model.SerializeToString())
        return f"{tensor.name}: {what}", at is not None
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = path.with_name(place["location"])
    data, start, length = file.read_bytes(), int(place["offset"]), int(place["length"])
    changed, what, at = _element(rng, data[start : start + length], dtype)
    file.write_bytes(data[:start] + changed + data[start + length :])
    return f"{tensor.name}: {what}", at is not None


def _element(rng: Random, data: bytes, dtype: str) -> tuple[bytes, str, int | None]:
    """The bytes with one element changed, how, and which one if it was a non-zero that became another."""
    width = WIDTHS.get(dtype, 1)
    sign = 1 << (8 * width - 1)
    count = len(data) // width
    held = [int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(count)]
    signed = dtype in FLOATS
    zero = [i for i, bits in enumerate(held) if not (bits & ~sign if signed else bits)]
    other = [i for i in range(count) if i not in set(zero)]
    choices = [("anything", range(count), rng.randrange(1 << (8 * width)), False)]
    if zero:
        choices += [
            ("zero to one bit", zero, 1, False),
            ("zero to non-zero", zero, held[other[0]] if other else 1, False),
        ]
    if other:
        choices += [("non-zero to zero", other, 0, False), ("non-zero to a neighbour", other, None, True)]
        if signed:
            choices += [("non-zero to -0.0", other, sign, False), ("other sign", other, -1, True)]
    if signed:
        choices.append(("NaN or infinity", range(count), rng.choice(FLOATS[dtype]), False))
    what, among, bits, harmless = rng.choice(choices)
    at = rng.choice(list(among))
    if bits is None:  # the lowest bit of a number that has others
        bits = held[at] ^ 1
        harmless = bool(bits & ~sign) and bits & ~sign not in FLOATS.get(dtype, ())
    elif bits == -1:
        bits = held[at] ^ sign
    return (
        data[: at * width] + bits.to_bytes(width, "little") + data[(at + 1) * width :],
        f"{what} at {at}",
        at if harmless else None,
    )
