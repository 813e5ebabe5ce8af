"""What a damaged file holds, read by struct and numpy alone: no line of spp-fx judges spp-fx here."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

WIDTHS = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}
FLOATS: dict[str, tuple[int, ...]] = {
    "F64": (0x7FF << 52, 0x7FF8 << 48, 0xFFF << 52, (0x7FF << 52) + 1),
    "F32": (0x7F800000, 0x7FC00000, 0xFF800000, 0x7F800001),
    "F16": (0x7C00, 0x7E00, 0xFC00, 0x7C01),
    "BF16": (0x7F80, 0x7FC0, 0xFF80, 0x7F81),
    "F8_E5M2": (0x7C, 0x7E, 0xFC, 0x7D),
    "F8_E4M3": (0x7F, 0xFF),
}
"""Infinities and NaNs of each float; the first is the smallest magnitude of all of them."""


class Unreadable(Exception):
    """There is no such weight, or not in a form that could be read."""


@dataclass(frozen=True)
class Look:
    """One weight: its shape, where it is not zero, whether it is finite."""

    shape: tuple[int, ...]
    mask: str
    finite: bool


Read = Callable[[Path, Mapping[str, bool]], dict[str, Look]]


def _look(bits: npt.NDArray[Any], dtype: str, shape: tuple[int, ...], transposed: bool) -> Look:
    """The look at unsigned integers of a dtype."""
    if transposed:
        bits, shape = bits.reshape(shape).swapaxes(-1, -2), (*shape[:-2], shape[-1], shape[-2])
    finite = True
    if dtype in FLOATS:
        magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        finite, bits = bool((magnitude < FLOATS[dtype][0]).all()), magnitude
    return Look(shape, hashlib.sha256(np.packbits(bits.reshape(-1) != 0).tobytes()).hexdigest(), finite)


def _numbers(array: npt.NDArray[Any], transposed: bool = False) -> Look:
    """The look at numbers that numpy knows."""
    canonical = array.swapaxes(-1, -2) if transposed else array
    mask = hashlib.sha256(np.packbits((canonical != 0).reshape(-1)).tobytes()).hexdigest()
    return Look(canonical.shape, mask, bool(np.isfinite(canonical.astype(np.float64)).all()))


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its bits as unsigned integers."""

    dtype: str
    shape: tuple[int, ...]
    bits: npt.NDArray[Any]

    def look(self, transposed: bool = False) -> Look:
        return _look(self.bits, self.dtype, self.shape, transposed)


def tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length).decode())
        body = file.read()
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        kind = f"<u{WIDTHS.get(entry['dtype'], 1)}"
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), np.frombuffer(body[start:end], kind))
    return found


def _folder_tensors(folder: Path) -> dict[str, Stored]:
    if (folder / "model.safetensors").is_file():
        return tensors(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Stored] = {}
    for file in sorted(set(index.values())):
        held = tensors(folder / file)
        if any(
            found[name].dtype != each.dtype
            or found[name].shape != each.shape
            or not np.array_equal(found[name].bits, each.bits)
            for name, each in held.items()
            if name in found
        ):
            raise Unreadable("a tensor is stored twice, and not the same")
        found |= held  # whatever the index says of single tensors, as transformers reads a folder
    return found


def folder(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """A model folder."""
    found = _folder_tensors(path)
    return {name: found[name].look(turned) for name, turned in sites.items()}


def file(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """One safetensors file."""
    found = tensors(path)
    return {name: found[name].look(turned) for name, turned in sites.items()}


def dense_site(path: Path, sites: Mapping[str, bool], *, names_are_known: bool) -> str | None:
    """The first site of a folder or file of 2:4 weights that has three non-zeros in a group of four.

    Args:
        names_are_known: a site that is missing is told as well: a model around the weights knows its name.
    """
    found = _folder_tensors(path) if path.is_dir() else tensors(path)
    for name in sites:
        if name not in found:
            if names_are_known:
                return f"{name} is gone"
            continue
        stored = found[name]
        if len(stored.shape) not in (2, 3):
            continue
        bits = stored.bits
        if stored.dtype in FLOATS:
            bits = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        groups = bits[: bits.size // 4 * 4].reshape(-1, 4)  # rows of whole groups: 2:4 refuses any other
        if stored.shape[-1] % 4 or ((groups != 0).sum(1) > 2).any():
            return f"{name}: {stored.shape} is not 2:4"
    return None


def adapter(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """An adapter stands for the masks of its base, which lies beside it."""
    return folder(path.parent / "model", sites)


def legacy(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """compressed-tensors' values and bitmask."""
    found = _folder_tensors(path)
    looks: dict[str, Look] = {}
    for name in sites:
        layer = name.removesuffix(".weight")
        if name in found:
            looks[name] = found[name].look()
            continue
        m, k = (int(x) for x in found[f"{layer}.shape"].bits)
        values, bits = found[f"{layer}.compressed"], found[f"{layer}.bitmask"].bits
        kept = np.unpackbits(bits.reshape(m, -1), axis=1, bitorder="little")[:, :k].astype(bool)
        dense = np.zeros((m, k), values.bits.dtype)
        dense[kept] = values.bits
        looks[name] = _look(dense.reshape(-1), values.dtype, (m, k), False)
    return looks


def bitmask(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """sparse-bitmask: the shapes are those of the header that the metadata holds."""
    place = path / "sparse" / "model.safetensors"
    with open(place, "rb") as stream:
        metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    inner, found = json.loads(metadata["header"]), tensors(place)
    looks: dict[str, Look] = {}
    for name, turned in sites.items():
        if name in found:
            looks[name] = found[name].look(turned)
            continue
        shape = tuple(inner[name]["shape"])
        kept = np.unpackbits(found[f"{name}.bitmask"].bits, bitorder="little")[: int(np.prod(shape))].astype(
            bool
        )
        values = found[f"{name}.values"]
        dense = np.zeros(kept.size, values.bits.dtype)
        dense[kept] = values.bits
        looks[name] = _look(dense, values.dtype, shape, turned)
    return looks


def packed(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """cusparselt and cutlass: values and metadata by themselves.

    The seeds keep two non-zeros of every four, so two packs have one mask only where the zeros among their
    values and every byte of their metadata are the same: no layout has to be known.
    """
    found = tensors(path / "packed.safetensors")
    looks: dict[str, Look] = {}
    for name in sites:
        if name in found:
            looks[name] = found[name].look()
            continue
        stored = found[f"{name}.packed"]
        m, meta = stored.shape[0], b""
        values = stored.bits
        if f"{name}.meta" in found:
            meta = found[f"{name}.meta"].bits.tobytes()
        else:  # cuSPARSELt's: 9/16 of the width, values first
            count = m * stored.shape[1] * 8 // 9
            values, meta = stored.bits[:count], stored.bits[count:].tobytes()
        look = _look(values, stored.dtype, (m, len(values) // m), False)
        looks[name] = Look(look.shape, look.mask + hashlib.sha256(meta).hexdigest(), look.finite)
    return looks


def export_onnx(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """The graph of an export."""
    return graph(path / "model.onnx", sites)


def graph(path: Path, sites: Mapping[str, bool]) -> dict[str, Look]:
    """An ONNX graph: initializers by onnx's own reader, chains of nodes by its reference evaluator."""
    model = onnx.ModelProto.FromString(path.read_bytes())
    dense = {tensor.name: tensor for tensor in model.graph.initializer}
    sparse = {each.values.name: each for each in model.graph.sparse_initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    looks: dict[str, Look] = {}
    for name, turned in sites.items():
        names = [
            *(t.name for t in model.graph.initializer),
            *(s.values.name for s in model.graph.sparse_initializer),
        ]
        if [*names, *(output for node in model.graph.node for output in node.output)].count(name) > 1:
            raise Unreadable(f"{name} is more than one value")
        if name in sparse:
            each = sparse[name]
            values, at = _array(path, each.values), _array(path, each.indices)
            at = np.ravel_multi_index(tuple(at.T), tuple(each.dims)) if at.ndim == 2 else at
            flat = np.zeros(int(np.prod(each.dims)), values.dtype)
            flat[at] = values
            looks[name] = _numbers(flat.reshape(tuple(each.dims)), turned)
        elif name in dense:
            looks[name] = _numbers(_array(path, dense[name]), turned)
        elif name in made:
            looks[name] = _numbers(_computed(path, model, name, made, dense), turned)
        else:
            raise Unreadable(name)
    return looks


def _array(path: Path, tensor: TensorProto) -> npt.NDArray[Any]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    with open(path.parent / place["location"], "rb") as stream:
        stream.seek(int(place.get("offset", 0)))
        data = stream.read(int(place.get("length", count * dtype.itemsize)))
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def _computed(
    path: Path,
    model: onnx.ModelProto,
    name: str,
    made: Mapping[str, onnx.NodeProto],
    dense: Mapping[str, TensorProto],
) -> npt.NDArray[Any]:
    """What the nodes behind a value compute of constants, in whatever order the file has them."""
    constants: dict[str, TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def need(value: str, behind: tuple[str, ...] = ()) -> None:
        if value in constants or any(value in node.output for node in nodes):
            return
        if value in dense and value not in made:
            constants[value] = numpy_helper.from_array(_array(path, dense[value]), value)
        elif value in made and value not in behind:
            for each in made[value].input:
                need(each, (*behind, value))
            nodes.append(made[value])
        else:
            raise Unreadable(value)

    need(name)
    output = helper.make_empty_tensor_value_info(name)
    cut = helper.make_graph(nodes, "cut", [], [output], initializer=list(constants.values()))
    program = helper.make_model(cut, opset_imports=[helper.make_opsetid("", 18)])
    return ReferenceEvaluator(program).run(None, {})[0]


READERS: dict[str, Read] = {
    "folder": folder,
    "file": file,
    "adapter": adapter,
    "legacy": legacy,
    "bitmask": bitmask,
    "packed": packed,
    "onnx": export_onnx,
    "graph": graph,
}
