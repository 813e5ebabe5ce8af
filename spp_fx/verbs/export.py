"""export: a sparse model folder in the form that a runtime takes, read back and checked."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spp_fx.console import grouped, megabytes
from spp_fx.errors import MaskError, UsageError
from spp_fx.exporters.format import ROUND_TO, Format, Say, Source, make_format
from spp_fx.exporters.manifest import Manifest, add_file, open_model, read_manifest
from spp_fx.parallel import Tick, no_tick
from spp_fx.sparsity.lock import LOCK_NAME, load_lock, lock_beside
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import check_output, workspace
from spp_fx.verbs.verify import verify
from spp_fx.verbs.write_lock import make_lock, nothing_sparse
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
    *,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
    **options: Any,
) -> Exported:
    """Write an export folder with manifest and lock, read it back and compare it with the model.

    When an interrupted run is started again, it keeps the files that it had finished and writes the same bytes,
    unless `fresh` is set. The ONNX formats start anew.

    Args:
        options: of the format, such as `dtype`.

    Raises:
        UsageError: an unknown format, an option that it does not have, or an output that exists.
        MaskError: what was read back is not the model. Nothing is written.
    """
    model, out = Path(model), Path(out)
    chosen = make_format(format, **options)
    provenance.load(model)  # a damaged history is an error before the work
    check_output(out, force, [model], say)
    source = open_source(
        model,
        task=getattr(chosen, "task", None),
        trust_remote_code=trust_remote_code,
        any_config=chosen.plain,
    )
    for note in source.folder.notes:
        say(note)
    if dtype := getattr(chosen, "dtype", None):
        source = replace(source, rounded_to=ROUND_TO[dtype])
    plan = _plan(source, chosen)
    inputs = [shard.path for shard in source.folder.shards]
    with workspace(out, plan, force=force, fresh=fresh, sources=[model], inputs=inputs, say=say) as work:
        source, temporary = replace(source, work=work), work.folder
        checks = chosen.write(source, temporary, tick, say)
        _record(source, temporary, chosen)
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


def _plan(source: Source, format: Format) -> dict[str, Any]:
    """What the files of an export depend on."""
    return {
        "verb": "export",
        "format": format.name,
        "settings": asdict(format),
        "libraries": {"torch": version("torch")},
        "base": source.folder.fingerprint(),
        "config": source.folder.config,
        "lock": blake2b(source.lock.dumps().encode()).hexdigest(),
    }


def _record(source: Source, folder: Path, format: Format) -> None:
    """Add this step to the model's history, and the history to the manifest."""
    manifest = read_manifest(folder, check_files=False)
    provenance.record(
        source.folder.path,
        folder,
        "export",
        inputs={"model": source.folder.fingerprint()},
        settings={"format": format.name} | asdict(format),
        digests=manifest.files,
    )
    add_file(folder, manifest, provenance.PROVENANCE)


def open_source(
    model: Path, *, task: str | None = None, trust_remote_code: bool = False, any_config: bool = False
) -> Source:
    """A model folder with its own lock, checked, or with a lock made of its sparse sites, found by the task's trace."""
    folder = open_model(model, any_config=any_config)
    if own := lock_beside(model):
        verdict = verify(model)
        # A sparsity_config is a problem of the folder as a whole, which `any_config` allows.
        failures = verdict.failures[len(verdict.problems) if any_config else 0 :]
        if failures:
            raise MaskError(f"{model}: {failures[0]}; export only what verifies")
        return Source(folder, own, trust_remote_code)
    found = find_sites(folder, task=task, trust_remote_code=trust_remote_code)
    made = make_lock(found)
    if not made.lock.sites:
        raise UsageError(str(nothing_sparse(model, made)))
    return Source(folder, made.lock, trust_remote_code)
