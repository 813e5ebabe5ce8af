"""export: a sparse model folder in the form that a runtime takes, checked from disk before it says ok."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spp_fx.console import grouped, megabytes
from spp_fx.errors import MaskError, UsageError
from spp_fx.exporters.format import FORMATS, ROUND_TO, ExportSettings, Format, Say, Source, find_format
from spp_fx.exporters.manifest import Manifest, add_file, open_model, read_manifest
from spp_fx.parallel import Tick, no_tick
from spp_fx.sparsity.lock import LOCK_NAME, load_lock, lock_beside
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import check_output, workspace
from spp_fx.verbs.lock import make_lock, nothing_sparse
from spp_fx.verbs.verify import verify
from spp_fx.verification import provenance
from spp_fx.verification.model_sites import find_sites


@dataclass(frozen=True)
class Exported:
    """What export wrote, and what was checked of it."""

    out: Path
    manifest: Manifest
    checks: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        files = sorted(p for p in self.out.rglob("*") if p.is_file())
        return {
            "ok": True,
            "out": str(self.out),
            "format": self.manifest.format,
            "pattern": self.manifest.pattern,
            "sizes": self.manifest.sizes,
            "sites": [
                {"name": t.name, "shape": t.shape, "layout": t.layout, "reason": t.reason, **t.details}
                for t in self.manifest.tensors
            ],
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "checks": self.checks,
        }

    def lines(self) -> Iterator[str]:
        data = self.to_json()
        size = sum(file["bytes"] for file in data["files"])
        yield f"{self.out}: {data['format']}, {len(data['sites'])} sparse weights, {megabytes(size)}"
        dense, sites = (data["sizes"].get(f"{each}_bytes", 0) for each in ("dense", "sites"))
        if dense:
            yield f"  they take {megabytes(sites)}, {sites / dense:.4g} of what they take dense"
        checks = {key.replace("_", " "): value for key, value in self.checks.items()}
        counts = [f"{value} {key}" for key, value in checks.items() if isinstance(value, int) and value]
        yield f"  checked: {', '.join(counts)}"
        for key, value in checks.items():
            if not isinstance(value, int):
                yield f"  {key}: {f'{value:.3g}' if isinstance(value, float) else value}"
        reasons = {each.name: each.reason for each in self.manifest.tensors if each.reason is not None}
        yield from (f"  {line}" for line in grouped(reasons))


@links_option
def export(
    model: str | Path,
    out: str | Path,
    format: str,
    settings: ExportSettings | None = None,
    *,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
) -> Exported:
    """Write an export folder beside its manifest and lock; what was written is read back and compared.

    An interrupted run goes on where its files were durable when it is called again, and writes the same
    bytes, unless `fresh` is set; the ONNX formats begin anew.

    Raises:
        UsageError: unknown format or SM, or an output that exists.
        MaskError: what was read back is not the model. Nothing is written.
    """
    model, out = Path(model), Path(out)
    chosen = find_format(format)
    settings = settings or ExportSettings()
    _check_options(chosen, settings)
    provenance.load(model)  # a damaged history is refused before the work
    check_output(out, force, [model], say)
    source = open_source(model, trust_remote_code=trust_remote_code, any_config=chosen.mends_config)
    for note in source.folder.notes:
        say(note)
    if settings.dtype is not None:
        source = replace(source, rounded_to=ROUND_TO[settings.dtype])
    plan = _plan(source, chosen, settings)
    inputs = [shard.path for shard in source.folder.shards]
    with workspace(out, plan, force=force, fresh=fresh, sources=[model], inputs=inputs, say=say) as work:
        source, temporary = replace(source, work=work), work.folder
        checks = chosen.write(source, temporary, settings, tick, say)
        _record(source, temporary, chosen, settings)
        if kept := source.kept_from_zero():
            checks["kept_from_zero"] = kept
            say(f"{kept} values would round to zero and were kept as the smallest normal number")
        verdict = verify(temporary)
        if not verdict.ok:
            raise MaskError(f"read back from the export: {verdict.failures[0]}")
        if load_lock(temporary / LOCK_NAME).by_name() != source.lock.by_name():
            raise MaskError(f"{format}: the lock of the export is not the model's")
        checks["masks_equal"] = sum(site.mask_equal is True for site in verdict.sites)
    return Exported(out, read_manifest(out, check_files=False), checks)


def _plan(source: Source, format: Format, settings: ExportSettings) -> dict[str, Any]:
    """What the files of an export depend on."""
    return {
        "verb": "export",
        "format": format.name,
        "settings": asdict(settings),
        "libraries": {"torch": version("torch")},
        "base": source.folder.fingerprint(),
        "config": source.folder.config,
        "lock": blake2b(source.lock.dumps().encode()).hexdigest(),
    }


def _record(source: Source, folder: Path, format: Format, settings: ExportSettings) -> None:
    """Add this step to the model's history, which the manifest then names as it does every other file."""
    manifest = read_manifest(folder, check_files=False)
    provenance.record(
        source.folder.path,
        folder,
        "export",
        inputs={"model": source.folder.fingerprint()},
        settings={"format": format.name} | {name: getattr(settings, name) for name in format.options},
        digests=manifest.files,
    )
    add_file(folder, manifest, provenance.PROVENANCE)


def _check_options(format: Format, settings: ExportSettings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name in format.options:
            continue
        takers = ", ".join(sorted(f.name for f in FORMATS.values() if field.name in f.options))
        option = field.name.replace("_", "-")
        raise UsageError(f"--{option} is no option of --format {format.name}; formats that take it: {takers}")
    if settings.dtype is not None and settings.dtype not in ROUND_TO:
        raise UsageError(f"--dtype takes {', '.join(ROUND_TO)}, got '{settings.dtype}'")


def open_source(model: Path, *, trust_remote_code: bool = False, any_config: bool = False) -> Source:
    """A model folder with the lock it came with, which must hold, or with one made of its sparse sites."""
    folder = open_model(model, any_config=any_config)
    if own := lock_beside(model):
        verdict = verify(model)
        # A sparsity_config is a problem of the whole, which `any_config` takes.
        failures = verdict.failures[len(verdict.problems) if any_config else 0 :]
        if failures:
            raise MaskError(f"{model}: {failures[0]}; export only what verifies")
        return Source(folder, own, trust_remote_code)
    found = find_sites(folder, trust_remote_code=trust_remote_code)
    made = make_lock(found)
    if not made.lock.sites:
        raise UsageError(str(nothing_sparse(model, made)))
    return Source(folder, made.lock, trust_remote_code)
