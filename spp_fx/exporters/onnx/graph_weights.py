"""The weights of an ONNX graph as verify examines them: under the graph's names, or under the model's.

A graph has the names of the loaded model, and one tensor for a stack of experts. A checkpoint may store them
otherwise: without the model's prefix, or each expert on its own. Then the export's manifest states which part of
the graph each stored tensor is, and the weights have the stored names.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.manifest import MANIFEST, Manifest, Part, read_manifest
from spp_fx.exporters.onnx.constants import Unfoldable, fold
from spp_fx.exporters.onnx.graph_values import GraphValues, Stored, Value, sources_of
from spp_fx.exporters.onnx.onnx_file import Array, OnnxFile
from spp_fx.exporters.onnx.operators import FLOATS
from spp_fx.exporters.onnx.products import Factor, Factors
from spp_fx.sparsity.scan import Scan, scan_tensor
from spp_fx.sparsity.weights import Sites, Weights, without

GRAPH = "model.onnx"
FORMATS = ("onnx", "onnx-packed", "onnx-dense")


class GraphWeights:
    """Every weight of an .onnx file: dense, sparse, or computed from constants."""

    def __init__(self, path: Path) -> None:
        self.file = OnnxFile(path)

    @cached_property
    def values(self) -> GraphValues:
        """The values of the graph.

        Raises:
            FormatError: the graph is damaged.
        """
        return GraphValues(self.file)

    @cached_property
    def factors(self) -> Factors:
        return Factors(self.values)

    @property
    def stored(self) -> frozenset[str]:
        """Initializers that are sparse, or have two dimensions or more and a type that weights have."""
        types = (*FLOATS, TensorProto.INT8)
        dense = (each for each in self.file.dense.values() if len(each.dims) > 1 and each.data_type in types)
        return frozenset(self.file.sparse) | {each.name for each in dense}

    def find(self, name: str) -> Value:
        """A value of the main graph; only one that is computed needs `values`."""
        holds = self.file.dense.get(name) or self.file.sparse.get(name)
        return self.values.find(name) if holds is None else Stored(name, holds=holds)

    def file_of(self, name: str) -> str:
        """The file that holds most of a weight's numbers: the graph's, or one beside it as the graph names it."""
        value = self.find(name)
        if value.maker is None and not isinstance(value, Stored):
            value = self.factors.sites[name].base
        largest = max(sources_of(value), key=lambda each: each.numel, default=None)
        if largest is None or largest.data.data_location != TensorProto.EXTERNAL:
            return self.file.path.name
        location = {each.key: each.value for each in largest.data.external_data}.get("location", "")
        return PurePosixPath(location).as_posix()

    def read(self, name: str) -> Tensor:
        """A weight's numbers, in the shape that the graph has it in.

        Raises:
            FormatError: it is damaged, or cannot be computed; names it and the file.
        """
        return self._read(name, lambda: fold(self.find(name), self.file))

    def scan(self, name: str, transposed: bool) -> Scan:
        """Scan a weight; a factor of a product is transposed if the product says so.

        Raises:
            FormatError: it is damaged, or not a matrix or a stack of such; names it and the file.
        """
        factor = self.factors.sites.get(name)
        if factor is None:
            return scan_tensor(self.read(name), transposed=transposed)
        return scan_tensor(
            self._read(name, lambda: _read_factor(factor, self.file)), transposed=factor.transposed
        )

    def _read(self, name: str, compute: Callable[[], Array]) -> Tensor:
        where = f"{name} ({self.file.path})"
        try:
            return _tensor(compute())
        except (FormatError, TypeError, Unfoldable) as error:  # TypeError: torch lacks some types of numpy
            if isinstance(error, FormatError) and str(error).startswith(where):
                raise
            raise FormatError(f"{where}: {error}") from error


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export's graph, under the names that the model's files have for them.

    Factors of products that the manifest does not name are `unread`, or `unreadable` if they cannot be read, under
    the graph's names, which are the loaded model's.

    Raises:
        FormatError: the graph is damaged, or lacks a tensor that the manifest names.
    """
    graph = GraphWeights(folder / GRAPH)
    stored = graph.stored
    others = set(stored)
    parts: dict[str, Part] = {}
    where: dict[str, str] = {}
    for at, record in enumerate(manifest.tensors):
        part = parts[record.name] = record.part or Part(initializer=record.name)
        where[record.name] = f"{folder / MANIFEST}: tensors.{at}.part"
        if part.initializer in stored:
            continue
        value = graph.find(part.initializer)
        if value.maker is None:
            raise FormatError(f"{where[record.name]}.initializer: {GRAPH} holds no {part.initializer}")
        if value not in graph.values.readers:
            raise FormatError(f"{part.initializer} ({graph.file.path}): nothing reads the weight")
        others.difference_update(each.name for each in sources_of(value))
    taken = {part.initializer for part in parts.values()}

    def scan(name: str, transposed: bool) -> Scan:
        if name not in parts:
            return scan_tensor(graph.read(name), transposed=transposed)
        weight = _cut(graph.read(parts[name].initializer), parts[name], where[name])
        return scan_tensor(weight, transposed=transposed)

    def find_sites() -> Sites:
        """What the manifest does not name is unread; the model's configuration may know whether it is a site."""
        found = graph.factors
        reason = f"a product multiplies by it, {MANIFEST} does not name it"
        unnamed = {
            name: reason
            for name, factor in found.sites.items()
            if not ({each.name for each in factor.tensors} or {name}) <= taken
        }
        return Sites(
            {record.name: record.transposed for record in manifest.tensors},
            without(found.refused, taken),
            without(found.left_out, taken),
            without(unnamed | found.unread, taken),
        )

    return Weights(
        frozenset(parts) | (others - taken),
        scan,
        lambda name: graph.file_of(parts[name].initializer if name in parts else name),
        find_sites,
    )


def read_graph(path: Path) -> Weights:
    """The weights of an .onnx file; one in its export folder is read as `read` does.

    Raises:
        UsageError: there is no such file.
        FormatError: it is damaged.
    """
    if path.name == GRAPH and path.is_file() and (path.parent / MANIFEST).is_file():
        manifest = read_manifest(path.parent)
        if manifest.format in FORMATS:
            return read(path.parent, manifest)
    graph = GraphWeights(path)
    found = graph.factors
    sparse = [name for name in graph.file.sparse if name not in found.refused]
    sites = dict.fromkeys(sparse, False) | {name: each.transposed for name, each in found.sites.items()}
    computed = (each for each in found.sites.values() if each.scattered)
    kept = {source.name for each in computed for source in sources_of(each.base)}
    return Weights(
        (graph.stored - kept) | sites.keys(),
        graph.scan,
        graph.file_of,
        lambda: Sites(sites, found.refused, found.left_out, without(found.unread, sites)),
        guessed=True,
    )


def _read_factor(factor: Factor, file: OnnxFile) -> Array:
    """The numbers of a site, (out, in), or with `transposed` (in, out); of three dimensions for a stack.

    Raises:
        FormatError, Unfoldable: they cannot be read or computed.
    """
    array = fold(factor.base, file)
    if factor.zero is not None:
        array = _shifted(array, fold(factor.zero, file), factor.zero_axis)
    if array.ndim < -factor.axis or array.ndim < 2:
        raise FormatError(f"has shape {list(array.shape)}, which is not a matrix")
    if factor.transposed and array.ndim <= 3:
        return array
    array = np.moveaxis(array, factor.axis, -1)
    if factor.matrix:
        array = array.reshape(-1, array.shape[-1])
    while array.ndim > 3 and 1 in array.shape[:-2]:
        array = array.squeeze(array.shape.index(1))
    if array.ndim > 3:
        array = array.reshape(-1, *array.shape[-2:])
    return array.swapaxes(-1, -2) if factor.transposed else array


def _shifted(array: Array, zero: Array, axis: int | None) -> Array:
    """Quantised numbers minus their zero point."""
    shape = list(zero.shape)
    if zero.size == 1:
        zero = zero.reshape(())
    elif zero.ndim == 1 and axis is not None and array.ndim >= -axis:
        zero = zero.reshape([-1 if at == axis else 1 for at in range(-array.ndim, 0)])
    try:
        if np.broadcast_shapes(array.shape, zero.shape) == array.shape:
            return array.astype(np.int32) - zero.astype(np.int32)
    except ValueError:
        pass
    raise FormatError(f"its zero point of shape {shape} does not fit {list(array.shape)}")


def _cut(weight: Tensor, part: Part, where: str) -> Tensor:
    """The rows of one expert of a stack; the weight itself if the part is all of it."""
    if part.swapped:
        weight = weight.transpose(-1, -2)
    if part.expert is None and part.stop > 0:
        if len(weight.shape) != 2 or not part.start < part.stop <= weight.shape[0]:
            raise FormatError(f"{where}: rows {part.start} to {part.stop} of shape {list(weight.shape)}")
        return weight[part.start : part.stop]
    if part.expert is None:
        return weight
    shape = list(weight.shape)
    if len(shape) != 3 or part.expert >= shape[0] or not part.start < part.stop <= shape[1]:
        raise FormatError(f"{where}: expert {part.expert}, rows {part.start} to {part.stop} of shape {shape}")
    return weight[part.expert, part.start : part.stop]


def _tensor(array: Array) -> Tensor:
    """A torch tensor of an array. Types of ml_dtypes are viewed, or widened if torch lacks them."""
    kind = array.dtype.name
    if kind in ("int4", "uint4", "int2", "uint2"):
        return torch.from_numpy(array.astype(np.int8))
    if kind.startswith(("float4_", "float6_")):
        return torch.from_numpy(array.astype(np.float32))
    if not array.flags.writeable or any(step < 0 for step in array.strides):  # the bytes of a protobuf
        array = array.copy()
    if kind == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if kind.startswith("float8_") and isinstance(dtype := getattr(torch, kind, None), torch.dtype):
        return torch.from_numpy(array.view(np.uint8)).view(dtype)
    return torch.from_numpy(array)
