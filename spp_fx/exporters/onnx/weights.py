"""The weights of an ONNX graph as verify looks at them: under the graph's names, or under the model's.

A graph names weights as the loaded model does, and holds a stack of experts as one tensor. Where a
checkpoint stores them otherwise (without the model's prefix, each expert on its own), the export's
manifest says which part of the graph each stored tensor is, and the weights come under the stored names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.manifest import MANIFEST, Manifest, Part, read_manifest
from spp_fx.exporters.onnx.factors import find_factors
from spp_fx.exporters.onnx.reader import OnnxFile
from spp_fx.exporters.onnx.unpack import Unpacked, find_unpacked, unpack
from spp_fx.exporters.registry import Weights
from spp_fx.sparsity import Scan, scan_tensor

GRAPH = "model.onnx"
FORMATS = ("onnx", "onnx-packed", "onnx-dense")
NO_SITE = ("lm_head", "wte", "wpe", "word_embeddings", "router", "gate")
"""Modules whose matrices are no sites, beside those that begin with embed, for graphs without a manifest."""


@dataclass(frozen=True)
class GraphWeights:
    """Every weight of a graph, dense, sparse or computed of packed constants."""

    file: OnnxFile
    computed: Mapping[str, Unpacked]

    @classmethod
    def open(cls, path: Path) -> "GraphWeights":
        file = OnnxFile(path)
        return cls(file, find_unpacked(file))

    @property
    def names(self) -> list[str]:
        parts = {name for each in self.computed.values() for name in (each.values, each.codes, each.table)}
        stored = [*self.file.dense, *self.file.sparse]
        return [*self.computed, *(n for n in stored if self.file.is_weight(n) and n not in parts)]

    def place(self, name: str) -> str:
        """The file that holds a weight's numbers, as the graph names it: the graph itself, or one beside it."""
        chain = self.computed.get(name)
        stored = chain.values if chain else name
        sparse = self.file.sparse.get(stored)
        tensor = sparse.values if sparse else self.file.dense[stored]
        if tensor.data_location != TensorProto.EXTERNAL:
            return self.file.path.name
        return PurePosixPath({each.key: each.value for each in tensor.external_data}["location"]).as_posix()

    def read(self, name: str) -> Tensor:
        """A weight's numbers, in the shape that the graph has it in."""
        chain = self.computed.get(name)
        return _tensor(unpack(self.file, chain) if chain else self.file.read(name))


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export's graph, under the names that the model's files have for them.

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
    return Weights(names, scan, file, lambda: sites)


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
    factors = dict(find_factors(graph.file.proto, set(graph.names)))

    def scan(name: str, transposed: bool) -> Scan:
        # How a weight is stored is for the product that reads it to say: the lock has it of the model's file.
        return scan_tensor(graph.read(name), transposed=factors.get(name, transposed))

    def sites() -> Mapping[str, bool]:
        packed = dict.fromkeys([*graph.file.sparse, *graph.computed], False)
        return packed | {n: turned for n, turned in factors.items() if n in packed or not _is_no_site(n)}

    return Weights(frozenset(graph.names), scan, graph.place, sites, guessed=True)


def _is_no_site(name: str) -> bool:
    """Whether a graph's name is that of an embedding, a router or the head, as far as names tell."""
    return any(word in NO_SITE or word.startswith("embed") for word in name.split("."))


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
    """A torch tensor of an array; numpy has bfloat16 only through ml_dtypes."""
    if not array.flags.writeable:  # the bytes of a protobuf
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
