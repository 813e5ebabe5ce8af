"""What verify reads: model, adapter and export folders, .safetensors and .onnx files, as named weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.legacy import is_legacy
from spp_fx.exporters.manifest import COMPACT, MANIFEST, open_model, read_manifest
from spp_fx.sparsity.lock import Lock, lock_beside
from spp_fx.sparsity.scan import scan_stored
from spp_fx.sparsity.weights import Sites, Weights, sites_by_name
from spp_fx.storage.folder import INDEX_NAME, WEIGHTS_NAME, ModelFolder, is_adapter
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.strict_json import read_object

# Tracing, formats and torch are imported where an artifact needs them: a model folder with its lock does not.


@dataclass(frozen=True)
class Artifact:
    """Weights with the lock that came with them, if any.

    Attributes:
        path: what was opened.
        kind: model, adapter, safetensors, onnx, cusparselt, compressed-tensors, ...
        lock: the lock beside it.
        problems: why it must not be released, whatever its sites hold, each with a remedy.
        part: it is one of several files of a model, and need not hold the sites of another artifact.
        notes: what is odd about it and does not change its weights; see `ModelFolder.notes`.
    """

    path: Path
    kind: str
    weights: Weights
    lock: Lock | None
    problems: tuple[str, ...] = ()
    part: bool = False
    notes: tuple[str, ...] = ()


def open_artifact(path: Path, *, trust_remote_code: bool = False) -> Artifact:
    """Open a model, adapter or export folder, a .safetensors or an .onnx file.

    Args:
        trust_remote_code: run code that a model folder brings, where its model has to be made to find its sites.

    Raises:
        UsageError: it is none of these.
        FormatError: a file of it is damaged.
    """
    if path.suffix == ".onnx":
        return _onnx(path, trust_remote_code)
    if path.suffix == ".safetensors":
        return _safetensors(path, trust_remote_code)
    if (path / MANIFEST).is_file():
        return _export(path, trust_remote_code)
    if is_adapter(path):
        return _adapter(path, trust_remote_code)
    if (path / "config.json").is_file():
        folder = ModelFolder.open(path)
        return _legacy(folder) if is_legacy(folder) else _model(open_model(path), trust_remote_code)
    raise not_an_artifact(path)


def not_an_artifact(path: Path) -> UsageError:
    if not path.exists():
        return UsageError(f"{path} does not exist")
    return UsageError(f"{path} is not a model, adapter or export folder, nor a .safetensors or .onnx file")


def _model(folder: ModelFolder, trust_remote_code: bool) -> Artifact:
    def find_sites() -> Sites:
        from spp_fx.verification import model_sites

        return model_sites.matched_sites(model_sites.find_sites(folder, trust_remote_code=trust_remote_code))

    weights = Weights(
        frozenset(folder.names),
        lambda name, transposed: scan_stored(folder.info(name)[0], name, transposed=transposed),
        lambda name: folder.info(name)[0].name,
        find_sites,
        lambda name: folder.info(name)[1].shape,
    )
    return Artifact(folder.path, "model", weights, lock_beside(folder.path), notes=folder.notes)


def _legacy(folder: ModelFolder) -> Artifact:
    """compressed-tensors' dropped format, its weights under the names that the model gives them."""
    from spp_fx.exporters.legacy import LegacyFolder
    from spp_fx.sparsity.scan import scan_tensor

    legacy = LegacyFolder.open(folder)

    def find_sites() -> Sites:
        others = {name: shape for name, shape in legacy.shapes.items() if name not in legacy.packed}
        return sites_by_name(others).with_sites(dict.fromkeys(legacy.packed, False))

    weights = Weights(
        frozenset(legacy.shapes),
        lambda name, transposed: scan_tensor(legacy.read(name), transposed=transposed),
        legacy.file,
        find_sites,
        legacy.shapes.__getitem__,
        guessed=True,
    )
    problems = (legacy.problem(),)
    return Artifact(folder.path, "compressed-tensors", weights, lock_beside(folder.path), problems)


def _adapter(path: Path, trust_remote_code: bool) -> Artifact:
    """An adapter stands for the masks of its own base, whose weights are scanned; its factors are checked here."""
    from spp_fx.adapters.adapter_folder import AdapterFolder

    adapter = AdapterFolder.open(path)
    adapter.check_finite()
    base = open_model(adapter.find_base())
    adapter.check_base(base)
    return replace(_model(base, trust_remote_code), path=path, kind="adapter", lock=adapter.lock)


def _safetensors(path: Path, trust_remote_code: bool) -> Artifact:
    refuse_part_of_export(path)
    shard = Shard.open(path)
    shapes = {name: info.shape for name, info in shard.header.tensors.items()}
    of_model, part = (path.parent / "config.json").is_file(), _is_part(path)

    def find_sites() -> Sites:
        if not of_model:
            return sites_by_name(shapes)
        if part:  # the folder accounts for the sites that no file of the model holds
            return _model(open_model(path.parent), trust_remote_code).weights.sites.within(shapes)
        from spp_fx.verification.model_sites import sites_by_config

        return sites_by_config(path.parent, shapes, trust_remote_code=trust_remote_code)

    weights = Weights(
        frozenset(shapes),
        lambda name, transposed: scan_stored(shard, name, transposed=transposed),
        lambda _: path.name,
        find_sites,
        shapes.__getitem__,
        guessed=not of_model,
    )
    return Artifact(path, "safetensors", weights, _lock_of_shard(shard), part=part)


def _is_part(path: Path) -> bool:
    """Whether the index beside a file names it as one of several; model.safetensors is never one of an index."""
    index = path.parent / INDEX_NAME
    if path.name == WEIGHTS_NAME or not index.is_file():
        return False
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index}: has no weight_map of tensor names to files; get it again")
    files = {file for file in cast("dict[str, object]", weight_map).values() if isinstance(file, str)}
    return path.name in files and len(files) > 1


def refuse_part_of_export(path: Path) -> None:
    """UsageError for a file that means nothing without the export around it."""
    folder = path.parent.parent if path.parent.name == COMPACT else path.parent
    if (folder / MANIFEST).is_file() and read_manifest(folder, check_files=False).format != "safetensors":
        raise UsageError(f"{path}: is part of the export {folder}; verify that folder")


def _lock_of_shard(shard: Shard) -> Lock | None:
    """The lock beside a file, less the sites that other shards of the folder hold."""
    folder = shard.path.parent
    lock = lock_beside(folder)
    if lock is None or not (folder / INDEX_NAME).is_file():
        return lock
    others = [other for other in ModelFolder.open(folder).shards if other.path.name != shard.path.name]
    elsewhere = {name for other in others for name in other.header.tensors} - shard.header.tensors.keys()
    return Lock.of(entry for entry in lock.sites if entry.name not in elsewhere)


def _export(path: Path, trust_remote_code: bool) -> Artifact:
    from spp_fx.exporters.format import FORMATS

    manifest = read_manifest(path)
    format = FORMATS.find(manifest.format)
    weights = format.read(path, manifest)

    def find_sites() -> Sites:
        """The manifest's sites, and every other weight of the model that could be one."""
        from spp_fx.verification.model_sites import sites_by_config, sites_of_graph

        if format.program:
            return sites_of_graph(path, manifest, weights, trust_remote_code=trust_remote_code)
        shapes = format.decode(path, manifest).shapes
        sites = sites_by_config(path, shapes, trust_remote_code=trust_remote_code)
        return sites.with_sites(weights.sites.transposed)

    return Artifact(path, manifest.format, replace(weights, find_sites=find_sites), lock_beside(path))


def _onnx(path: Path, trust_remote_code: bool) -> Artifact:
    from spp_fx.exporters.onnx.graph_weights import FORMATS, GRAPH, read_graph

    folder = path.parent
    in_export = path.name == GRAPH and path.is_file() and (folder / MANIFEST).is_file()
    if in_export and read_manifest(folder, check_files=False).format in FORMATS:
        return replace(_export(folder, trust_remote_code), path=path, kind="onnx")
    return Artifact(path, "onnx", read_graph(path), lock_beside(folder))
