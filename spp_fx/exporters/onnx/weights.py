"""The weights of an ONNX graph as verify looks at them: under the graph's names, or under the model's.

A graph names weights as the loaded model does, and holds a stack of experts as one tensor. Where a
checkpoint stores them otherwise (without the model's prefix, each expert on its own), the export's
manifest says which part of the graph each stored tensor is, and the weights come under the stored names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import SparseTensorProto, TensorProto
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.format import Weights
from spp_fx.exporters.manifest import MANIFEST, Manifest, Part, read_manifest
from spp_fx.exporters.onnx.factors import Factors
from spp_fx.exporters.onnx.reader import OnnxFile
from spp_fx.exporters.onnx.unpack import Unpacked, find_unpacked, unpack
from spp_fx.sparsity.scan import Scan, scan_tensor

GRAPH = "model.onnx"
FORMATS = ("onnx", "onnx-packed", "onnx-dense")


@dataclass(frozen=True)
class GraphWeights:
    """Every weight of a graph, dense, sparse or computed of packed constants."""

    file: OnnxFile
    computed: Mapping[str, Unpacked]

    @classmethod
    def open(cls, path: Path) -> "GraphWeights":
        file = OnnxFile(path)
        return cls(file, find_unpacked(file))

    @cached_property
    def factors(self) -> Factors:
        """What the products of the graph do with its weights.

        Raises:
            FormatError: the graph is damaged.
        """
        return Factors(self.file, self.computed)

    @property
    def names(self) -> list[str]:
        parts = {name for each in self.computed.values() for name in (each.values, each.codes, each.table)}
        stored = [*self.file.dense, *self.file.sparse]
        return [*self.computed, *(n for n in stored if self.file.is_weight(n) and n not in parts)]

    def place(self, name: str) -> str:
        """The file that holds a weight's numbers, as the graph names it: the graph itself, or one beside it."""
        tensor = self._holder(name)
        if tensor is None or tensor.data_location != TensorProto.EXTERNAL:
            return self.file.path.name
        location = {each.key: each.value for each in tensor.external_data}.get("location", "")
        return PurePosixPath(location).as_posix()

    def _holder(self, name: str) -> TensorProto | None:
        chain = self.computed.get(name)
        stored = chain.values if chain else name
        holds = self.file.sparse.get(stored) or self.file.dense.get(stored)
        if holds is None and (source := self.factors.stored_of(name)) is not None:
            holds = source.holds
        return holds.values if isinstance(holds, SparseTensorProto) else holds

    def read(self, name: str) -> Tensor:
        """A weight's numbers, in the shape that the graph has it in."""
        chain = self.computed.get(name)
        return _tensor(unpack(self.file, chain) if chain else self.file.read(name))

    def scan(self, name: str, transposed: bool) -> Scan:
        """Look at a weight; how a factor of a product is stored is for the product to say.

        Raises:
            FormatError: it is damaged, or not a matrix or a stack of such; names it and the file.
        """
        factor = self.factors.sites.get(name)
        try:
            if factor is None:
                return scan_tensor(self.read(name), transposed=transposed)
            return scan_tensor(_tensor(self.factors.read(name)), transposed=factor.transposed)
        except (FormatError, TypeError) as error:  # torch has not every type that numpy has
            where = f"{name} ({self.file.path})"
            if str(error).startswith(where):
                raise
            raise FormatError(f"{where}: {error}") from error


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export's graph, under the names that the model's files have for them.

    Factors of products that the manifest does not name are `unread`, or `refused` where they cannot be looked
    at, under the graph's names, which are the loaded model's.

    Raises:
        FormatError: the graph is damaged, or holds no tensor that the manifest names.
    """
    graph = GraphWeights.open(folder / GRAPH)
    known = set(graph.names)
    parts: dict[str, Part] = {}
    for index, record in enumerate(manifest.tensors):
        part = record.part or Part(initializer=record.name)
        if part.initializer not in known:
            raise FormatError(
                f"{folder / MANIFEST}: tensors.{index}.part.initializer: {GRAPH} holds no {part.initializer}"
            )
        parts[record.name] = part
    places = {
        record.name: f"{folder / MANIFEST}: tensors.{at}.part" for at, record in enumerate(manifest.tensors)
    }

    def scan(name: str, transposed: bool) -> Scan:
        part = parts.get(name)
        if part is None:
            return scan_tensor(graph.read(name), transposed=transposed)
        return scan_tensor(_cut(graph.read(part.initializer), part, places[name]), transposed=transposed)

    def file(name: str) -> str:
        return graph.place(parts[name].initializer if name in parts else name)

    sites = {record.name: record.transposed for record in manifest.tensors}
    taken = {part.initializer for part in parts.values()}
    names = frozenset(parts) | (known - taken)

    def others(of: Mapping[str, str]) -> Mapping[str, str]:
        return {name: reason for name, reason in of.items() if name not in taken}

    def unread() -> Mapping[str, str]:
        """What no one names: its products are those of the model, whose configuration may know more of them."""
        unnamed = [name for name in graph.factors.sites if not graph.factors.tensors_of(name) <= taken]
        reason = f"a product multiplies by it, {MANIFEST} does not name it"
        return others(dict.fromkeys(unnamed, reason) | graph.factors.unread)

    return Weights(
        names,
        scan,
        file,
        lambda: sites,
        refused=lambda: others(graph.factors.refused),
        left_out=lambda: others(graph.factors.left_out),
        unread=unread,
    )


def read_graph(path: Path) -> Weights:
    """The weights of an .onnx file; one that lies in its export folder is read as `read` does.

    Raises:
        UsageError: there is no such file.
        FormatError: it is damaged.
    """
    if path.name == GRAPH and path.is_file() and (path.parent / MANIFEST).is_file():
        manifest = read_manifest(path.parent)
        if manifest.format in FORMATS:
            return read(path.parent, manifest)
    graph = GraphWeights.open(path)
    found = graph.factors
    packed = [name for name in (*graph.file.sparse, *graph.computed) if name not in found.refused]
    sites = dict.fromkeys(packed, False) | {name: each.transposed for name, each in found.sites.items()}
    return Weights(
        frozenset(graph.names) | sites.keys(),
        graph.scan,
        graph.place,
        lambda: sites,
        refused=lambda: found.refused,
        left_out=lambda: found.left_out,
        unread=lambda: {name: reason for name, reason in found.unread.items() if name not in sites},
        guessed=True,
    )


def _cut(weight: Tensor, part: Part, where: str) -> Tensor:
    """The rows of one expert of a stack; the weight itself where the part is all of it."""
    if part.swapped:
        weight = weight.transpose(-1, -2)
    if part.expert is None:
        return weight
    shape = list(weight.shape)
    if len(shape) != 3 or part.expert >= shape[0] or not part.start < part.stop <= shape[1]:
        raise FormatError(f"{where}: expert {part.expert}, rows {part.start} to {part.stop} of shape {shape}")
    return weight[part.expert, part.start : part.stop]


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """A torch tensor of an array; what numpy has only through ml_dtypes is viewed, or widened where it is narrow."""
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
