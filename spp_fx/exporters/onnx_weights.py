"""The weights of an ONNX graph as verify looks at them: under the graph's names, or under the model's.

A graph names weights as the loaded model does, and holds a stack of experts as one tensor. Where a
checkpoint stores them otherwise (without the model's prefix, each expert on its own), the export's
manifest says which part of the graph each stored tensor is, and the weights come under the stored names.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.manifest import MANIFEST, Manifest, Part, TensorRecord, read_manifest
from spp_fx.exporters.onnx_reader import DenseInitializer, SparseInitializer, load_sparse_masks
from spp_fx.exporters.registry import Weights
from spp_fx.sparsity import PackedMask, Scan, scan_tensor

GRAPH = "model.onnx"


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export's graph, under the names that the model's files have for them."""
    scans, _ = _scan_graph(folder / GRAPH, manifest.tensors)
    return _weights(folder / GRAPH, scans, {record.name: record.transposed for record in manifest.tensors})


def read_graph(path: Path) -> Weights:
    """The weights of an .onnx file; one that lies in its export folder is read as `read` does.

    Raises:
        UsageError: there is no such file.
        FormatError: it is damaged.
    """
    if path.name == GRAPH and path.is_file() and (path.parent / MANIFEST).is_file():
        manifest = read_manifest(path.parent, check_files=False)
        if manifest.format == "onnx":
            return read(path.parent, manifest)
    scans, sparse = _scan_graph(path, [])
    return _weights(path, scans, dict.fromkeys(sparse, False))


def _weights(path: Path, scans: Mapping[str, Scan], sites: Mapping[str, bool]) -> Weights:
    def scan(name: str, transposed: bool) -> Scan:
        return _transpose(scans[name]) if transposed else scans[name]

    return Weights(frozenset(scans), scan, lambda _: path.name, lambda: sites)


def _scan_graph(path: Path, records: list[TensorRecord]) -> tuple[dict[str, Scan], list[str]]:
    """Look at every weight once: scans in storage order by name, and the names of the sparse ones."""
    placed: dict[str, list[tuple[int, str, Part]]] = {}
    for index, record in enumerate(records):
        if record.part is not None:
            placed.setdefault(record.part.initializer, []).append((index, record.name, record.part))
    scans: dict[str, Scan] = {}
    sparse: list[str] = []
    for found in load_sparse_masks(path):
        if isinstance(found, SparseInitializer):
            sparse.append(found.name)
        if found.name not in placed:
            scans[found.name] = _scan(found)
        for index, name, part in placed.pop(found.name, []):
            scans[name] = _scan(_cut(found, part, f"{path.parent / MANIFEST}: tensors.{index}.part"))
    for initializer, ((index, *_), *_) in placed.items():
        raise FormatError(
            f"{path.parent / MANIFEST}: tensors.{index}.part.initializer: {path.name} holds no {initializer}"
        )
    return scans, sparse


def _cut(
    found: SparseInitializer | DenseInitializer, part: Part, where: str
) -> SparseInitializer | DenseInitializer:
    """Rows of one expert of a stack; the initializer itself where the part is all of it."""
    if part.expert is None:
        return found
    shape = found.shape if isinstance(found, SparseInitializer) else found.array.shape
    if len(shape) != 3 or part.expert >= shape[0] or not part.start < part.stop <= shape[1]:
        raise FormatError(
            f"{where}: expert {part.expert}, rows {part.start} to {part.stop} of shape {list(shape)}"
        )
    if isinstance(found, DenseInitializer):
        return DenseInitializer(found.name, found.array[part.expert, part.start : part.stop])
    first, last = ((part.expert * shape[1] + row) * shape[2] for row in (part.start, part.stop))
    low, high = np.searchsorted(found.indices, [first, last])
    return replace(
        found,
        shape=(part.stop - part.start, shape[2]),
        indices=found.indices[low:high] - first,
        values=found.values[low:high],
    )


def _scan(found: SparseInitializer | DenseInitializer) -> Scan:
    if isinstance(found, DenseInitializer):
        return scan_tensor(_tensor(found.array))
    strange = found.indices[~np.isfinite(found.values)]
    place = np.unravel_index(strange[0], found.shape) if strange.size else None
    first = None if place is None else tuple(int(i) for i in place)
    return Scan(PackedMask.from_bool(found.mask()), int(strange.size), first)


def _transpose(scan: Scan) -> Scan:
    mask = PackedMask.from_bool(scan.mask.to_bool().swapaxes(-1, -2))
    first = scan.first_non_finite
    return Scan(mask, scan.non_finite, None if first is None else (*first[:-2], first[-1], first[-2]))


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file's bytes are not writable: they are only read
            return torch.from_numpy(array)
    except TypeError:  # bfloat16, which numpy has only through ml_dtypes
        return torch.from_numpy(array.astype(np.float32))
