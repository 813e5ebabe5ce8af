"""Anything that verify reads, as named weights whose zeros can be looked at."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from spp_fx.checkpoint import INDEX_NAME, ModelFolder, Shard
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import COMPACT, MANIFEST, read_manifest
from spp_fx.exporters.sparsity_config import is_legacy
from spp_fx.sparsity import LOCK_NAME, Lock, Scan, Weights, load_lock, scan_file
from spp_fx.workflows.adapter_folder import CONFIG, AdapterFolder
from spp_fx.workflows.open_model import open_model

# Tracing, formats and torch are imported where an artifact needs them: a model folder with its lock does not.

NO_SITE = ("embed", "lm_head", "wte", "wpe", "norm")
"""Words in the names of matrices that are no sites, for files without a model that could be traced."""
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Artifact:
    """Weights with the lock that came with them, if any.

    Attributes:
        path: what was opened.
        kind: model, adapter, safetensors, onnx, cusparselt, compressed-tensors, ...
        problems: why it must not be released, whatever its sites hold; each says how to mend it.
    """

    path: Path
    kind: str
    weights: Weights
    lock: Lock | None
    problems: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return self.weights.names


def open_artifact(path: Path) -> Artifact:
    """Open a model, adapter or export folder, a .safetensors or an .onnx file.

    Raises:
        UsageError: it is none of these.
        FormatError: a file of it is damaged.
    """
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if (path / MANIFEST).is_file():
        return _export(path)
    if (path / CONFIG).is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        folder = ModelFolder.open(path)
        return _legacy(folder) if is_legacy(folder) else _model(path)
    what = (
        "does not exist"
        if not path.exists()
        else "is no model, adapter or export folder, .safetensors or .onnx file"
    )
    raise UsageError(f"{path} {what}")


def _lock_beside(folder: Path) -> Lock | None:
    path = folder / LOCK_NAME
    return load_lock(path) if os.path.lexists(path) else None  # a broken one is no absent one


def _model(path: Path) -> Artifact:
    folder = open_model(path)

    def scan(name: str, transposed: bool) -> Scan:
        shard, info = folder.info(name)
        return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)

    def sites() -> Mapping[str, bool]:
        from spp_fx.passes import Match
        from spp_fx.workflows.survey import choose, survey, tensors_of

        found = survey(path)
        names, _ = choose(found, Match(dense=True))
        pieces = tensors_of(piece for name in names for piece in found.pieces[name])
        return {name: piece.transposed for name, piece in pieces.items()}

    def file(name: str) -> str:
        return folder.info(name)[0].name

    return Artifact(path, "model", Weights(frozenset(folder.names), scan, file, sites), _lock_beside(path))


def _legacy(folder: ModelFolder) -> Artifact:
    """compressed-tensors' dropped format, its weights under the names that the model gives them."""
    from spp_fx.exporters.compressed_tensors import LegacyFolder
    from spp_fx.sparsity import scan_tensor

    legacy = LegacyFolder.open(folder)

    def scan(name: str, transposed: bool) -> Scan:
        return scan_tensor(legacy.read(name), transposed=transposed)

    def sites() -> Mapping[str, bool]:
        plain = {name for name, shape in legacy.shapes.items() if len(shape) == 2 and _looks_like_site(name)}
        floating = {name for name in plain if legacy.dtypes[name] in FLOATING}
        return dict.fromkeys(legacy.packed | floating, False)

    weights = Weights(frozenset(legacy.shapes), scan, legacy.file, sites)
    return Artifact(
        folder.path, "compressed-tensors", weights, _lock_beside(folder.path), (legacy.problem(),)
    )


def _adapter(path: Path) -> Artifact:
    """An adapter stands for the masks of its own base, which is looked at; its factors are checked here."""
    adapter = AdapterFolder.open(path)
    for name, info in adapter.shard.header.tensors.items():
        row = (1, prod(info.shape))
        if scan_file(adapter.shard.path, info.start, row, info.dtype).first_non_finite is not None:
            raise FormatError(
                f"{adapter.shard.path}: the factor {name} holds NaN or infinity; train it again"
            )
    base = adapter.find_base()
    adapter.check_base(open_model(base))
    return Artifact(path, "adapter", _model(base).weights, adapter.lock)


def _safetensors(path: Path) -> Artifact:
    refuse_part_of_export(path)
    shard = Shard.open(path)

    def scan(name: str, transposed: bool) -> Scan:
        info = shard.info(name)
        return scan_file(path, info.start, info.shape, info.dtype, transposed=transposed)

    def sites() -> Mapping[str, bool]:
        if (path.parent / "config.json").is_file():
            known = _model(path.parent).weights.sites()
            return {name: transposed for name, transposed in known.items() if name in shard.header.tensors}
        return {
            name: False
            for name, info in shard.header.tensors.items()
            if len(info.shape) == 2 and info.dtype in FLOATING and _looks_like_site(name)
        }

    weights = Weights(frozenset(shard.header.tensors), scan, lambda _: path.name, sites)
    return Artifact(path, "safetensors", weights, _lock_of_shard(shard))


def refuse_part_of_export(path: Path) -> None:
    """UsageError for a file that means nothing without the export around it."""
    folder = path.parent.parent if path.parent.name == COMPACT else path.parent
    if (folder / MANIFEST).is_file() and read_manifest(folder, check_files=False).format != "safetensors":
        raise UsageError(f"{path}: is part of the export {folder}; verify that folder")


def _lock_of_shard(shard: Shard) -> Lock | None:
    """The lock beside a file, less the sites that the folder's index places in other shards."""
    lock = _lock_beside(shard.path.parent)
    index = shard.path.parent / INDEX_NAME
    if lock is None or not index.is_file():
        return lock
    elsewhere = {
        name
        for other in ModelFolder.open(shard.path.parent).shards
        if other.path.name != shard.path.name
        for name in other.header.tensors
    }
    return Lock.of(entry for entry in lock.sites if entry.name not in elsewhere)


def _looks_like_site(name: str) -> bool:
    return name.endswith("weight") and not any(word in name for word in NO_SITE)


def _export(path: Path) -> Artifact:
    from spp_fx.exporters import find_format

    manifest = read_manifest(path)
    format = find_format(manifest.format)
    weights = format.read(path, manifest)

    def sites() -> Mapping[str, bool]:
        """The manifest's, and every other weight of the model that could be one."""
        from spp_fx.workflows.survey import expected_sites

        shapes = format.decode(path, manifest).shapes if format.decode else None
        known = expected_sites(path, shapes)
        others = {name: transposed for name, transposed in known.items() if name in weights.names}
        return others | dict(weights.sites())

    return Artifact(path, manifest.format, replace(weights, sites=sites), _lock_beside(path))


def _onnx(path: Path) -> Artifact:
    from spp_fx.exporters.onnx import read_graph

    return Artifact(path, "onnx", read_graph(path), _lock_beside(path.parent))


def each(artifact: Artifact, sites: Mapping[str, bool]) -> Iterator[tuple[str, Scan | None]]:
    """Every site with its scan, None where the artifact has no such weight."""
    for name, transposed in sites.items():
        yield name, artifact.weights.scan(name, transposed) if name in artifact.names else None
