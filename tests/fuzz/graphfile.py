"""ONNX files whose protobuf is sound and says what no exporter would say."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, numpy_helper

INTEGERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    16,
    31,
    -1,
    -2,
    127,
    255,
    2**31 - 1,
    -(2**31),
    2**33,
    2**62,
    2**63 - 1,
    -(2**63),
)
TEXTS = (
    "",
    "a",
    "x0",
    "layers.0.w",
    "layers.1.w",
    "\0",
    "\n",
    "x" * 100_000,
    "../model.onnx",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "model.onnx",
    "config.json",
    "99999999999999999999",
    "-1",
    "1e3",
    "0x10",
    "²",
)


def mutate(rng: Random, path: Path) -> str:
    """Change the model at a path."""
    model = onnx.ModelProto.FromString(path.read_bytes())
    operation = rng.choice([_any_field] * 8 + list(OPERATIONS))
    what = operation(rng, model)
    path.write_bytes(model.SerializeToString())
    return what


def _messages(message: Message, path: str = "") -> list[tuple[str, Message]]:
    found = [(path, message)]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for index, each in enumerate(value if field.is_repeated else [value]):
                found += _messages(each, f"{path}.{field.name}[{index}]")
    return found


def _any_field(rng: Random, model: onnx.ModelProto) -> str:
    """Some field of some message: gone, another value, one more, one less, in another order."""
    where, message = rng.choice(_messages(model))
    field = rng.choice(message.DESCRIPTOR.fields)
    if rng.random() < 0.7 and message.ListFields():
        field = rng.choice(message.ListFields())[0]
    where = f"{where}.{field.name}"
    if rng.random() < 0.15:
        message.ClearField(field.name)
        return f"clear {where}"
    if field.is_repeated:
        return f"{_repeated(rng, message, field)} {where}"
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
        return f"set {where}"
    setattr(message, field.name, _scalar(rng, field))
    return f"set {where}"


def _repeated(rng: Random, message: Message, field: FieldDescriptor) -> str:
    values = getattr(message, field.name)
    held = list(values)
    choice = rng.choice(["drop", "double", "shuffle", "add", "many"])
    if choice == "drop" and held:
        del values[rng.randrange(len(held))]
        return choice
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        copies = [type(each).FromString(each.SerializeToString()) for each in held]
        if choice == "double" and copies:
            copies.append(rng.choice(copies))
        elif choice == "shuffle":
            rng.shuffle(copies)
        del values[:]
        values.extend(copies)
        if choice == "add" or not copies:
            values.add()
        return choice
    if choice == "double" and held:
        held.append(rng.choice(held))
    elif choice == "shuffle":
        rng.shuffle(held)
    else:
        held += [_scalar(rng, field) for _ in range(3000 if choice == "many" else 1)]
    del values[:]
    values.extend(held)
    return choice


def _scalar(rng: Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice([b"", b"\0", b"\xff" * 7, rng.randbytes(64), b"none", b"add"])
        return rng.choice(TEXTS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice([0.0, 1.0, float("nan"), float("inf"), -1e30])
    value = rng.choice(INTEGERS)
    if kind == FieldDescriptor.CPPTYPE_INT32:
        return max(-(2**31), min(2**31 - 1, value))
    if kind == FieldDescriptor.CPPTYPE_UINT64:
        return value % 2**64
    return value


def _tensors(model: onnx.ModelProto) -> list[TensorProto]:
    sparse = [part for each in model.graph.sparse_initializer for part in (each.values, each.indices)]
    attributes = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return [*model.graph.initializer, *sparse, *attributes]


def _dims(rng: Random, model: onnx.ModelProto) -> str:
    shaped = [*_tensors(model), *model.graph.sparse_initializer]
    tensor = rng.choice(shaped)
    dims = list(tensor.dims)
    choices = [dims[::-1], [*dims, 1], [1, *dims], dims[:-1], [2**62, 4], [2**31, 2**31], [-1, -1], [0], []]
    if dims and dims[0] % 2 == 0:
        choices.append([dims[0] // 2, 2, *dims[1:]])
    tensor.ClearField("dims")
    tensor.dims.extend(rng.choice(choices))
    return "dims"


def _type(rng: Random, model: onnx.ModelProto) -> str:
    tensor = rng.choice(_tensors(model))
    tensor.data_type = rng.choice([*TensorProto.DataType.values(), 99, -1])
    return f"data_type of {tensor.name[:40]}"


def _external(rng: Random, model: onnx.ModelProto) -> str:
    """Data elsewhere, or another place of data that is elsewhere already."""
    tensors = _tensors(model)
    tensor = rng.choice([each for each in tensors if each.external_data] or tensors)
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    held = {entry.key: entry.value for entry in tensor.external_data}
    held.setdefault("location", "config.json")
    key = rng.choice(["location", "offset", "length", "checksum"])
    near = (
        [str(int(held[key]) + step) for step in (-4, -1, 1, 4, 16)]
        if key in held and key != "location"
        else []
    )
    held[key] = rng.choice([*TEXTS, *near, *near, *near])
    tensor.ClearField("external_data")
    for name, value in held.items():
        tensor.external_data.add(key=name, value=value)
    if rng.random() < 0.2:
        tensor.external_data.add(key="location", value=rng.choice(TEXTS))
    return f"external {key}"


def _indices(rng: Random, model: onnx.ModelProto) -> str:
    """Positions of a sparse tensor that are out of order, twice, elsewhere or outside."""
    if not model.graph.sparse_initializer:
        return _dims(rng, model)
    sparse = rng.choice(model.graph.sparse_initializer)
    try:
        indices = numpy_helper.to_array(sparse.indices).copy()
    except (ValueError, onnx.checker.ValidationError, FileNotFoundError):  # they lie in the data file
        return _external(rng, model)
    at, other = rng.randrange(len(indices)), rng.randrange(len(indices))
    choice = rng.choice(["swap", "repeat", "shift", "outside", "negative", "pairs", "unsorted pairs"])
    if choice == "swap":
        indices[[at, other]] = indices[[other, at]]
    elif choice == "repeat":
        indices[at] = indices[other]
    elif choice == "shift":
        indices[at] += rng.choice([-1, 1])
    elif choice == "outside":
        indices[-1] = np.iinfo(indices.dtype).max
    elif choice == "negative":
        indices[0] = -1
    else:
        rows = np.stack(np.unravel_index(indices, tuple(sparse.dims)), 1).astype(np.int64)
        indices = rows if choice == "pairs" else rows[::-1].copy()
    sparse.indices.CopyFrom(numpy_helper.from_array(indices))
    return f"indices {choice}"


def _swap_data(rng: Random, model: onnx.ModelProto) -> str:
    """Two tensors change their numbers."""
    first, second = rng.choice(_tensors(model)), rng.choice(_tensors(model))
    same = [t for t in _tensors(model) if t.dims == first.dims and t.data_type == first.data_type]
    second = rng.choice(same) if rng.random() < 0.8 else second
    copy = TensorProto.FromString(first.SerializeToString())
    names = first.name, second.name
    first.CopyFrom(second)
    second.CopyFrom(copy)
    first.name, second.name = names
    return "swapped data"


def _circle(rng: Random, model: onnx.ModelProto) -> str:
    """A node that reads what it makes."""
    node = rng.choice(model.graph.node)
    if node.input and node.output:
        node.input[rng.randrange(len(node.input))] = node.output[0]
    return "circle"


def _bypass(rng: Random, model: onnx.ModelProto) -> str:
    """A chain of nodes that reads the constants of another."""
    names = [tensor.name for tensor in model.graph.initializer]
    node = rng.choice(model.graph.node)
    if node.input and names:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    return "another input"


def _shadow(rng: Random, model: onnx.ModelProto) -> str:
    """A name that two things of the graph have."""
    name = rng.choice([t.name for t in model.graph.initializer] or ["x0"])
    node = rng.choice(model.graph.node)
    if rng.random() < 0.5 and node.output:
        node.output[0] = name
    else:
        model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), name))
    return "shadow"


def _typed_data(rng: Random, model: onnx.ModelProto) -> str:
    """Numbers in the field of their type, not as raw bytes; one of them changed or missing."""
    tensor = rng.choice([t for t in _tensors(model) if t.data_type == TensorProto.FLOAT] or _tensors(model))
    values = list(np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], np.float32))
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    if values and rng.random() < 0.5:
        values[rng.randrange(len(values))] = rng.choice([0.0, 1.0, float("nan")])
    tensor.float_data.extend(values[: len(values) - rng.choice([0, 0, 1])])
    return "float_data"


OPERATIONS: tuple[Callable[[Random, onnx.ModelProto], str], ...] = (
    _dims,
    _type,
    _external,
    _external,
    _indices,
    _indices,
    _swap_data,
    _circle,
    _bypass,
    _shadow,
    _typed_data,
)
