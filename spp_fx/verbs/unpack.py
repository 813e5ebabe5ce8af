"""unpack: the plain model folder of an export or of a legacy compressed-tensors folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spp_fx.console import megabytes
from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.exporters.format import FORMATS, Format, Say, decoding_formats
from spp_fx.exporters.legacy import LegacyFolder, is_legacy
from spp_fx.exporters.manifest import MANIFEST, TENSOR_FILES, Manifest, read_manifest, sha256
from spp_fx.exporters.plain import write_plain_config
from spp_fx.exporters.read_back import NOT_IN_TORCH, LibraryReader, difference
from spp_fx.parallel import Tick, no_tick
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.storage.folder import WEIGHTS_NAME, ModelFolder, within
from spp_fx.storage.links import links_option
from spp_fx.storage.safetensors import dtype_name
from spp_fx.storage.workspace import workspace
from spp_fx.storage.writer import copy_file, write_safetensors
from spp_fx.verbs.verify import verify
from spp_fx.verification import provenance
from spp_fx.verification.provenance import PROVENANCE


@dataclass(frozen=True)
class Unpacked:
    """What unpack wrote.

    Attributes:
        format: of the export.
        exact: whether the weight files are the model's own, byte for byte.
        checks: what was read back, and how much of it.
    """

    out: Path
    format: str
    exact: bool
    checks: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {
            "ok": True,
            "out": str(self.out),
            "format": self.format,
            "bit_for_bit": self.exact,
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "checks": self.checks,
        }

    def lines(self) -> Iterator[str]:
        size = sum(file["bytes"] for file in self.to_json()["files"])
        how = "weight files byte for byte as they were" if self.exact else "one model.safetensors"
        yield f"{self.out}: unpacked from {self.format}, {megabytes(size)}, {how}"
        for key, value in self.checks.items():
            yield f"  checked, {key.replace('_', ' ')}: {value}"


@links_option
def unpack(
    export: str | Path,
    out: str | Path,
    force: bool = False,
    *,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
) -> Unpacked:
    """Write the model folder that an export was made from; read it back, compare it, check it against the lock.

    sparse-bitmask and safetensors give the weight files back byte for byte; other formats give one
    model.safetensors, each tensor as the export decodes it. A folder of compressed-tensors' legacy
    sparse-24-bitmask is decoded too, its config.json without what says that it is compressed.

    Raises:
        UsageError: not an export, a format that cannot give a model back, or an output that exists.
        FormatError: a damaged file.
        MaskError: what was read back does not match the lock. Nothing is written.
    """
    export, out = Path(export), Path(out)
    if (export / MANIFEST).is_file():
        manifest = read_manifest(export)
        chosen = FORMATS.find(manifest.format)
        if chosen.program:
            raise UsageError(
                f"{export}: {chosen.name} is a program of its own, in which weights may be renamed, split and "
                f"folded: it does not give the model's files back; {decoding_formats()} do. Export the model in "
                "one of these"
            )
        with workspace(out, {"verb": "unpack"}, force=force, sources=[export], say=say) as work:
            _copy_others(export, manifest, work.folder)
            exact, checks = _from_export(export, manifest, chosen, work.folder, tick)
            _keep_history(export, work.folder, exact=exact)
        return Unpacked(out, chosen.name, exact, checks)
    if (export / "config.json").is_file() and is_legacy(folder := ModelFolder.open(export)):
        with workspace(out, {"verb": "unpack"}, force=force, sources=[export], say=say) as work:
            checks = _from_legacy(LegacyFolder.open(folder), work.folder, tick, say)
            _keep_history(export, work.folder, exact=False)
        return Unpacked(out, "compressed-tensors", False, checks)
    reason = "is not an export folder" if export.exists() else "does not exist"
    raise UsageError(f"{export}: {reason}; give a folder that 'spp-fx export' wrote")


def _keep_history(export: Path, target: Path, *, exact: bool) -> None:
    """The history of the model that comes back: its own where its files do, else with this step added."""
    history = provenance.load(export)
    if history is None:
        return
    if not exact:
        digests = {WEIGHTS_NAME: sha256(target / WEIGHTS_NAME)}
        provenance.record(export, target, "unpack", inputs={}, settings={}, digests=digests)
        return
    steps = history.steps[:-1] if history.steps[-1].step == "export" else history.steps  # export is undone
    if steps:
        (target / PROVENANCE).write_text(provenance.Provenance.of(steps).dumps(), encoding="ascii")


def _copy_others(export: Path, manifest: Manifest, target: Path) -> None:
    """Configuration, tokenizer and every other file without weights; the lock, unless export had to make it."""
    skipped = {MANIFEST, PROVENANCE} | (
        {LOCK_NAME} if manifest.requirements.get("model_has_lock") == 0 else set()
    )
    for name in manifest.files:
        if name not in skipped and not name.endswith((*TENSOR_FILES, ".safetensors.index.json")):
            copy_file(within(export, name), within(target, name))


def _from_export(
    export: Path, manifest: Manifest, format: type[Format], target: Path, tick: Tick
) -> tuple[bool, dict[str, int]]:
    """Write the weight files; returns whether they are the model's own, and what was compared."""
    decoded = format.decode(export, manifest)
    exact = format.restore(export, manifest, target, tick)
    if not exact:
        sites = {record.name: record.dtype for record in manifest.tensors}
        dtypes = {name: sites.get(name) or dtype_name(decoded.read(name).dtype) for name in decoded.shapes}
        _write(target, decoded.shapes, dtypes, decoded.read, tick)
    equal = _compare(target, decoded.shapes, decoded.read)
    return exact, {"tensors_equal": equal, "masks_equal": _check_masks(target, export / LOCK_NAME)}


def _from_legacy(legacy: LegacyFolder, target: Path, tick: Tick, say: Say) -> dict[str, int]:
    for path in legacy.folder.other_files():
        copy_file(legacy.folder.path / path, target / path)
    write_plain_config(legacy.folder, target, say)
    _write(target, legacy.shapes, legacy.dtypes, legacy.read, tick)
    lock = legacy.folder.path / LOCK_NAME
    checks = {"tensors_equal": _compare(target, legacy.shapes, legacy.read)}
    return checks | ({"masks_equal": _check_masks(target, lock)} if lock.is_file() else {})


def _check_masks(target: Path, lock: Path) -> int:
    """Check what was written against a lock; returns how many masks are equal."""
    verdict = verify(target, lock=lock)
    if not verdict.ok:
        raise MaskError(f"read back from the unpacked model: {verdict.failures[0]}")
    return len(verdict.sites)


def _compare(target: Path, names: Iterable[str], read: Callable[[str], Tensor]) -> int:
    """Compare written tensors, as the safetensors library reads them, with what was decoded; returns how many."""
    model, library, count = ModelFolder.open(target), LibraryReader(), 0
    for name in names:
        shard, info = model.info(name)
        if info.dtype in NOT_IN_TORCH:
            continue
        if difference(read(name), library.read(shard.path, name)):
            raise FormatError(f"{shard.path}: {name}: read back, it is not what the export decodes to")
        count += 1
    return count


def _write(
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    read: Callable[[str], Tensor],
    tick: Tick,
) -> None:
    def produce(name: str) -> Tensor:
        tensor = read(name)
        tick(name, tensor.nbytes)
        return tensor

    specs = [(name, dtypes[name], shape) for name, shape in shapes.items()]
    write_safetensors(target / WEIGHTS_NAME, specs, produce, {"format": "pt"})
