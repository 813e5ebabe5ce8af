"""Anything that verify reads, as named weights whose zeros can be scanned."""

import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spp_fx.adapters.adapter_folder import AdapterFolder, is_adapter
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import COMPACT, MANIFEST, Manifest, is_legacy, read_manifest, sparsity_configs
from spp_fx.sparsity.lock import Lock, lock_beside
from spp_fx.sparsity.scan import Scan, Weights, is_matrix, scan_file
from spp_fx.storage.folder import INDEX_NAME, WEIGHTS_NAME, ModelFolder
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.strict_json import read_object

if TYPE_CHECKING:
    from spp_fx.verify.model_sites import Expected


def open_model(path: Path, *, weights: bool = True, any_config: bool = False) -> ModelFolder:
    """Open a model folder whose tensors are the model's own.

    Args:
        weights: whether it must hold any.
        any_config: take a folder of plain weights whose config.json has a sparsity_config, too.

    Raises:
        UsageError: an export in a form that transformers cannot load.
        FormatError: a file is damaged, or the weights are compressed.
    """
    if (path / MANIFEST).is_file() and (form := read_manifest(path).format) != "safetensors":
        raise UsageError(f"{path}: is an export ({form}); give the model folder that it was made from")
    folder = ModelFolder.open(path, weights=weights)
    _check_plain(folder, any_config)
    return folder


def _check_plain(folder: ModelFolder, any_config: bool) -> None:
    """FormatError if the weights are compressed-tensors', which transformers fills with random numbers."""
    packed = [name for name in folder.names if name.endswith((".bitmask", ".compressed"))]
    if packed:
        raise FormatError(
            f"{folder.path}: its weights are compressed (first: {packed[0]}); servers and transformers load "
            f"such a model with random weights. Write the plain folder with 'spp-fx unpack {folder.path}'"
        )
    if sparsity_configs(folder.config) and not any_config:
        raise FormatError(
            f"{folder.path}: config.json has a sparsity_config, which servers refuse or misread; "
            f"write the plain folder with 'spp-fx unpack {folder.path}'"
        )


_PARTS = ("bias", "blocks", "inv", "scale", "scales", "zeros")
"""Last words of what lies beside a stack, or is a part of a quantised one."""


@dataclass(frozen=True)
class ByNames:
    """The tensors of a file by what their names say; vectors are in none of these.

    Attributes:
        sites: matrices and stacks of them that pruning would look at.
        left_out: embeddings and heads, each with that reason.
        unread: every other matrix, with what is known of it.
    """

    sites: tuple[str, ...]
    left_out: dict[str, str]
    unread: dict[str, str]


def by_names(shapes: Mapping[str, tuple[int, ...]]) -> ByNames:
    """Sort stored tensors by their names and shapes."""
    sites: list[str] = []
    left_out: dict[str, str] = {}
    unread: dict[str, str] = {}
    for name, shape in shapes.items():
        if not is_matrix(shape):
            continue
        if (reason := _no_linear(name)) is not None:
            left_out[name] = reason
        elif (reason := _unclear(name, shape)) is not None:
            unread[name] = reason
        else:
            sites.append(name)
    return ByNames(tuple(sites), left_out, unread)


def is_site(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a matrix, or a stack of them, that pruning would look at.

    Stacks of experts are parameters of their own in many models and need not be called a weight.
    """
    return bool(by_names({name: shape}).sites)


def _no_linear(name: str) -> str | None:
    """What a matrix is instead of a linear, if its name says so."""
    modules = name.removesuffix(".weight").split(".")
    if "lm_head" in modules[-2:]:
        return "is the head, by its name"
    if modules[-1] in ("wte", "wpe") or modules[-1].startswith("embed") or modules[-1].endswith("embeddings"):
        return "is an embedding, by its name"
    return None


def _unclear(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a matrix may or may not be a linear's weight."""
    words = _words(name)
    last = name.removesuffix(".weight").rpartition(".")[2]
    if any(word.rstrip("0123456789").endswith("norm") for word in _words(last)):
        return "is a norm, by its name, and a matrix, by its shape"
    if len(shape) == 3 and words[-1] in _PARTS:
        return "is a part of a stack, by its name, and not the weight itself"
    if len(shape) > 2 and any(re.fullmatch(r"conv[123]?d?", word) for word in words):
        return "is the kernel of a convolution, by its name"
    if len(shape) > 3:
        return f"has {len(shape)} dimensions, a mask has two or three"
    if len(shape) == 2 and not name.endswith("weight"):
        return "is not called a weight"
    return None


def _words(name: str) -> list[str]:
    """`layers.0.input_layernorm.weight` -> layers, 0, input, layernorm, weight."""
    return re.split(r"[._]", name)


# Tracing, formats and torch are imported where an artifact needs them: a model folder with its lock does not.


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
        from spp_fx.verify.model_sites import expected_of, survey

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
    from spp_fx.exporters.legacy import LegacyFolder
    from spp_fx.sparsity.scan import scan_tensor

    legacy = LegacyFolder.open(folder)

    def scan(name: str, transposed: bool) -> Scan:
        return scan_tensor(legacy.read(name), transposed=transposed)

    named = by_names({name: shape for name, shape in legacy.shapes.items() if name not in legacy.packed})
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
        from spp_fx.verify.model_sites import Expected, expected_sites

        if not of_model:
            named = by_names(shapes)
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
    from spp_fx.exporters.format import find_format

    manifest = read_manifest(path)
    format = find_format(manifest.format)
    weights = format.read(path, manifest)

    @cache
    def expected() -> "Expected":
        """The manifest's sites, and every other weight of the model that could be one."""
        from spp_fx.verify.model_sites import Expected, expected_sites

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
    from spp_fx.verify.model_sites import Expected, loaded_program

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
    from spp_fx.exporters.onnx.graph_weights import FORMATS, GRAPH, read_graph

    folder = path.parent
    in_export = path.name == GRAPH and path.is_file() and (folder / MANIFEST).is_file()
    if in_export and read_manifest(folder, check_files=False).format in FORMATS:
        return replace(_export(folder, trust_remote_code), path=path, kind="onnx")
    return Artifact(path, "onnx", read_graph(path), lock_beside(path.parent))
