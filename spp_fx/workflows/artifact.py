"""Anything that verify reads, as named weights whose zeros can be looked at."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spp_fx.checkpoint import INDEX_NAME, ModelFolder, Shard
from spp_fx.checkpoint.json_file import read_object
from spp_fx.checkpoint.layout import WEIGHTS_NAME
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import COMPACT, MANIFEST, Manifest, read_manifest
from spp_fx.exporters.sparsity_config import is_legacy
from spp_fx.sparsity import Lock, Scan, Weights, lock_beside, scan_file
from spp_fx.workflows import lone
from spp_fx.workflows.adapter_folder import AdapterFolder, is_adapter
from spp_fx.workflows.open_model import open_model

# Tracing, formats and torch are imported where an artifact needs them: a model folder with its lock does not.

if TYPE_CHECKING:
    from spp_fx.workflows.survey import Expected


@dataclass(frozen=True)
class Artifact:
    """Weights with the lock that came with them, if any.

    Attributes:
        path: what was opened.
        kind: model, adapter, safetensors, onnx, cusparselt, compressed-tensors, ...
        problems: why it must not be released, whatever its sites hold; each says how to mend it.
        part: one of several files of a model: it need not hold the sites of another artifact.
        notes: what is odd about it and does not change its weights; see `ModelFolder.notes`.
    """

    path: Path
    kind: str
    weights: Weights
    lock: Lock | None
    problems: tuple[str, ...] = ()
    part: bool = False
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return self.weights.names


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
        return _legacy(folder) if is_legacy(folder) else _model(path, trust_remote_code)
    what = (
        "does not exist"
        if not path.exists()
        else "is not a model, adapter or export folder, nor a .safetensors or .onnx file"
    )
    raise UsageError(f"{path} {what}")


def _model(path: Path, trust_remote_code: bool) -> Artifact:
    folder = open_model(path)

    def scan(name: str, transposed: bool) -> Scan:
        shard, info = folder.info(name)
        return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)

    def file(name: str) -> str:
        return folder.info(name)[0].name

    @cache
    def expected() -> "Expected":
        from spp_fx.workflows.survey import expected_of, survey

        return expected_of(survey(path, trust_remote_code=trust_remote_code))

    weights = Weights(
        frozenset(folder.names),
        scan,
        file,
        sites=lambda: expected().sites,
        refused=lambda: expected().refused,
        left_out=lambda: expected().left_out,
        unread=lambda: expected().unread,
        shape=lambda name: folder.info(name)[1].shape,
    )
    return Artifact(path, "model", weights, lock_beside(path), notes=folder.notes)


def _legacy(folder: ModelFolder) -> Artifact:
    """compressed-tensors' dropped format, its weights under the names that the model gives them."""
    from spp_fx.exporters.compressed_tensors import LegacyFolder
    from spp_fx.sparsity import scan_tensor

    legacy = LegacyFolder.open(folder)

    def scan(name: str, transposed: bool) -> Scan:
        return scan_tensor(legacy.read(name), transposed=transposed)

    named = lone.by_names({name: shape for name, shape in legacy.shapes.items() if name not in legacy.packed})
    weights = Weights(
        frozenset(legacy.shapes),
        scan,
        legacy.file,
        sites=lambda: dict.fromkeys([*legacy.packed, *named.sites], False),
        left_out=lambda: named.left_out,
        unread=lambda: named.unread,
        guessed=True,
        shape=legacy.shapes.__getitem__,
    )
    return Artifact(folder.path, "compressed-tensors", weights, lock_beside(folder.path), (legacy.problem(),))


def _adapter(path: Path, trust_remote_code: bool) -> Artifact:
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
    model = _model(base, trust_remote_code)
    return Artifact(path, "adapter", model.weights, adapter.lock, notes=model.notes)


def _safetensors(path: Path, trust_remote_code: bool) -> Artifact:
    refuse_part_of_export(path)
    shard = Shard.open(path)

    def scan(name: str, transposed: bool) -> Scan:
        info = shard.info(name)
        return scan_file(path, info.start, info.shape, info.dtype, transposed=transposed)

    shapes = {name: info.shape for name, info in shard.header.tensors.items()}
    of_model, part = (path.parent / "config.json").is_file(), _is_part(path)

    @cache
    def expected() -> "Expected":
        from spp_fx.workflows.survey import Expected, expected_sites

        if not of_model:
            named = lone.by_names(shapes)
            return Expected(dict.fromkeys(named.sites, False), {}, named.left_out, named.unread)
        if part:  # what no file of the model holds is asked of the folder
            whole = _model(path.parent, trust_remote_code).weights
            sites = {name: turned for name, turned in whole.sites().items() if name in shapes}
            refused, left_out, unread = (
                _within(table(), shapes) for table in (whole.refused, whole.left_out, whole.unread)
            )
            return Expected(sites, refused, left_out, unread)
        return expected_sites(path.parent, shapes, trust_remote_code=trust_remote_code)

    weights = Weights(
        frozenset(shapes),
        scan,
        lambda _: path.name,
        sites=lambda: expected().sites,
        refused=lambda: expected().refused,
        left_out=lambda: expected().left_out,
        unread=lambda: expected().unread,
        guessed=not of_model,
        shape=shapes.__getitem__,
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
    """The lock beside a file, less the sites that the folder's index places in other shards."""
    lock = lock_beside(shard.path.parent)
    index = shard.path.parent / INDEX_NAME
    if lock is None or not index.is_file():
        return lock
    elsewhere = {
        name
        for other in ModelFolder.open(shard.path.parent).shards
        if other.path.name != shard.path.name
        for name in other.header.tensors.keys() - shard.header.tensors.keys()
    }
    return Lock.of(entry for entry in lock.sites if entry.name not in elsewhere)


def _export(path: Path, trust_remote_code: bool) -> Artifact:
    from spp_fx.exporters import find_format

    manifest = read_manifest(path)
    format = find_format(manifest.format)
    weights = format.read(path, manifest)

    @cache
    def expected() -> "Expected":
        """The manifest's sites, and every other weight of the model that could be one."""
        from spp_fx.workflows.survey import Expected, expected_sites

        if format.decode:
            shapes = format.decode(path, manifest).shapes
            others = expected_sites(path, shapes, trust_remote_code=trust_remote_code)
        else:
            others = _in_graph(path, manifest, weights, trust_remote_code)
        sites = others.sites | dict(weights.sites())
        return Expected(
            sites, others.refused, _without(others.left_out, sites), _without(others.unread, sites)
        )

    asked = replace(
        weights,
        sites=lambda: expected().sites,
        refused=lambda: expected().refused,
        left_out=lambda: expected().left_out,
        unread=lambda: expected().unread,
    )
    return Artifact(path, manifest.format, asked, lock_beside(path))


def _without(reasons: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if name not in names}


def _in_graph(path: Path, manifest: Manifest, weights: Weights, trust_remote_code: bool) -> "Expected":
    """The sites of a program, which holds them as the loaded model does, but for parts that its manifest names.

    What the graph holds besides is known by the model's names for it, or by what the graph does with it.
    """
    from spp_fx.workflows.survey import Expected, loaded_program

    rows: Counter[str] = Counter()
    for record in manifest.tensors:
        rows[record.part.initializer if record.part else record.name] += prod(record.shape[:-1])
    sites: dict[str, bool] = {}
    refused: dict[str, str] = {}
    program, dense = loaded_program(path, len(weights.names), trust_remote_code=trust_remote_code)
    for name in program.matched:
        site = program.sites[name]
        if name not in rows:
            sites[name] = site.transposed
        elif rows[name] < (all_rows := prod(site.shape[:-1])):
            refused[name] = (
                f"{MANIFEST} names {rows[name]} of its {all_rows} rows, the others cannot be told apart"
            )
    known = sites.keys() | rows.keys()
    # A graph holds what its outputs depend on: of the model's matrices those that it has, and its own.
    roles = {name: why.reason for name, why in program.left_out.items() if why.known} | dense
    unclear = {name: why.reason for name, why in program.left_out.items() if not why.known}
    known = sites.keys() | rows.keys()
    left_out = _without({**weights.left_out(), **_within(roles, weights.names)}, known)
    refused |= _without(weights.refused(), known | left_out.keys())
    unread = {**weights.unread(), **_within(unclear, weights.names)}
    return Expected(sites, refused, left_out, _without(unread, known | left_out.keys() | refused.keys()))


def _within(reasons: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if name in names}


def _onnx(path: Path, trust_remote_code: bool) -> Artifact:
    from spp_fx.exporters.onnx.weights import FORMATS, GRAPH, read_graph

    folder = path.parent
    in_export = path.name == GRAPH and path.is_file() and (folder / MANIFEST).is_file()
    if in_export and read_manifest(folder, check_files=False).format in FORMATS:
        return replace(_export(folder, trust_remote_code), path=path, kind="onnx")
    return Artifact(path, "onnx", read_graph(path), lock_beside(path.parent))
