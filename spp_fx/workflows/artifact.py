"""Anything that verify reads, as named weights whose zeros can be looked at."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spp_fx.checkpoint import ModelFolder, Shard
from spp_fx.errors import UsageError
from spp_fx.exporters import cusparselt
from spp_fx.exporters.manifest import MANIFEST, Manifest, read_manifest
from spp_fx.exporters.onnx_sparse import SparseInitializer, load_sparse_masks
from spp_fx.passes import Match
from spp_fx.sparsity import LOCK_NAME, Lock, PackedMask, Scan, load_lock, scan_file, scan_tensor
from spp_fx.workflows.adapter_folder import CONFIG, AdapterFolder
from spp_fx.workflows.survey import choose, survey, tensors_of

NO_SITE = ("embed", "lm_head", "wte", "wpe", "norm")
"""Words in the names of matrices that are no sites, for files without a model that could be traced."""


@dataclass(frozen=True)
class Artifact:
    """Named weights, looked at one by one.

    Attributes:
        path: what was opened.
        kind: model, adapter, safetensors, onnx, cusparselt, ...
        names: its weights.
        scan: look at a weight, given its name and whether it is stored (in, out).
        file: the name of the file that holds a weight.
        lock: the lock that came with it, if any.
        sites: the weights that must be sparse where no lock says so: name -> stored (in, out)?
            Found on demand, since a model has to be traced for it.
    """

    path: Path
    kind: str
    names: frozenset[str]
    scan: Callable[[str, bool], Scan]
    file: Callable[[str], str]
    lock: Lock | None
    sites: Callable[[], Mapping[str, bool]] = field(repr=False)


def open_artifact(path: Path) -> Artifact:
    """Open a model, adapter or export folder, a .safetensors or an .onnx file.

    Raises:
        UsageError: it is none of these.
        FormatError: a file of it is damaged.
    """
    if path.suffix == ".onnx":
        return _onnx(path, "onnx", _lock_beside(path.parent))
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if (path / MANIFEST).is_file():
        return _export(path)
    if (path / CONFIG).is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _model(path)
    what = (
        "does not exist"
        if not path.exists()
        else "is no model, adapter or export folder, .safetensors or .onnx file"
    )
    raise UsageError(f"{path} {what}")


def _lock_beside(folder: Path) -> Lock | None:
    path = folder / LOCK_NAME
    return load_lock(path) if path.is_file() else None


def _model(path: Path, kind: str = "model") -> Artifact:
    folder = ModelFolder.open(path)

    def scan(name: str, transposed: bool) -> Scan:
        shard, info = folder.info(name)
        return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)

    def sites() -> Mapping[str, bool]:
        found = survey(path)
        names, _ = choose(found, Match(dense=True))
        pieces = tensors_of(piece for name in names for piece in found.pieces[name])
        return {name: piece.transposed for name, piece in pieces.items()}

    def file(name: str) -> str:
        return folder.info(name)[0].name

    return Artifact(path, kind, frozenset(folder.names), scan, file, _lock_beside(path), sites)


def _adapter(path: Path) -> Artifact:
    """An adapter stands for its base's masks: the base is looked at, the factors are checked when opened."""
    adapter = AdapterFolder.open(path)
    for name in adapter.shard.header.tensors:
        where = scan_tensor(adapter.shard.read(name).reshape(1, -1)).first_non_finite
        if where is not None:
            raise UsageError(f"{adapter.shard.path}: the factor {name} holds NaN or infinity; train it again")
    base = _model(adapter.find_base())
    return Artifact(path, "adapter", base.names, base.scan, base.file, adapter.lock, base.sites)


def _safetensors(path: Path) -> Artifact:
    shard = Shard.open(path)

    def scan(name: str, transposed: bool) -> Scan:
        info = shard.info(name)
        return scan_file(path, info.start, info.shape, info.dtype, transposed=transposed)

    def sites() -> Mapping[str, bool]:
        if (path.parent / "config.json").is_file():
            known = _model(path.parent).sites()
            return {name: transposed for name, transposed in known.items() if name in shard.header.tensors}
        return {
            name: False
            for name, info in shard.header.tensors.items()
            if len(info.shape) == 2 and info.dtype in ("F64", "F32", "F16", "BF16") and _looks_like_site(name)
        }

    lock = _lock_beside(path.parent)
    return Artifact(
        path, "safetensors", frozenset(shard.header.tensors), scan, lambda _: path.name, lock, sites
    )


def _looks_like_site(name: str) -> bool:
    return name.endswith("weight") and not any(word in name for word in NO_SITE)


def _export(path: Path) -> Artifact:
    manifest = read_manifest(path)
    if manifest.format == "safetensors":
        return _model(path)
    if manifest.format == "cusparselt":
        return _cusparselt(path, manifest)
    if manifest.format == "onnx":
        return _onnx(path / "model.onnx", "onnx", _lock_beside(path))
    raise UsageError(f"{path / MANIFEST}: this release does not read the format '{manifest.format}'")


def _cusparselt(path: Path, manifest: Manifest) -> Artifact:
    shard = Shard.open(path / cusparselt.WEIGHTS)
    sm = cusparselt.sm_of(manifest)
    records = {record.name: record for record in manifest.tensors}

    def scan(name: str, transposed: bool) -> Scan:
        record = records[name]
        if record.layout != cusparselt.DENSE:
            return scan_tensor(cusparselt.read_weight(shard, record, sm))
        info = shard.info(name)
        return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=record.transposed)

    def sites() -> Mapping[str, bool]:
        return {name: record.transposed for name, record in records.items()}

    lock = _lock_beside(path)
    return Artifact(path, "cusparselt", frozenset(records), scan, lambda _: shard.name, lock, sites)


def _onnx(path: Path, kind: str, lock: Lock | None) -> Artifact:
    """Weights of a graph; each is read once, its mask kept."""
    masks: dict[str, Scan] = {}
    sparse: set[str] = set()
    for found in load_sparse_masks(path):
        if isinstance(found, SparseInitializer):
            sparse.add(found.name)
            values = torch.from_numpy(found.values.astype("float32"))
            finite = scan_tensor(values.reshape(1, -1))
            masks[found.name] = Scan(
                PackedMask.from_bool(found.mask()), finite.non_finite, finite.first_non_finite
            )
        else:
            masks[found.name] = scan_tensor(_tensor(found.array))

    def scan(name: str, transposed: bool) -> Scan:
        if not transposed:
            return masks[name]
        stored = masks[name]
        mask = PackedMask.from_bool(stored.mask.to_bool().swapaxes(-1, -2))
        return Scan(mask, stored.non_finite, stored.first_non_finite)

    def sites() -> Mapping[str, bool]:
        return dict.fromkeys(sparse, False)

    return Artifact(path, kind, frozenset(masks), scan, lambda _: path.name, lock, sites)


def _tensor(array: object) -> Tensor:
    try:
        return torch.from_numpy(array)  # type: ignore[arg-type]
    except TypeError:  # bfloat16, which numpy has only through ml_dtypes
        return torch.from_numpy(array.astype("float32"))  # type: ignore[attr-defined]


def each(artifact: Artifact, sites: Mapping[str, bool]) -> Iterator[tuple[str, Scan | None]]:
    """Every site with its scan, None where the artifact has no such weight."""
    for name, transposed in sites.items():
        yield name, artifact.scan(name, transposed) if name in artifact.names else None
