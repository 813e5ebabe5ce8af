"""inspect: the sites of a model, their patterns, and which of them inject would match."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_fx.console import Table, grouped, shape
from spp_fx.errors import SppFxError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.program import Site
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern
from spp_fx.storage.links import links_option
from spp_fx.verification.model_sites import ModelSites, find_sites, scan_sites


@dataclass(frozen=True)
class SiteView:
    """One site as inspect shows it; pattern and sparsity are None where no weight was read."""

    site: Site
    pattern: Pattern | None
    sparsity: float | None
    matched: bool
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.site.name,
            "kind": self.site.kind,
            "shape": list(self.site.shape),
            "dtype": str(self.site.dtype).removeprefix("torch."),
            "layer": self.site.layer,
            "pattern": None if self.pattern is None else str(self.pattern),
            "sparsity": self.sparsity,
            "matched": self.matched,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Inspected:
    """A model folder as inspect shows it.

    Attributes:
        task: what it was traced for; None where it was not.
        others: its matrices that are not sites, each with the reason.
        notes: those of `ModelSites`.
    """

    model: Path
    model_type: str
    task: str | None
    sites: list[SiteView]
    others: dict[str, str]
    notes: tuple[str, ...]
    total: int
    stored_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "model_type": self.model_type,
            "task": self.task,
            "sites": [site.to_json() for site in self.sites],
            "others": self.others,
            "notes": list(self.notes),
            "total_parameters": self.total,
            "stored_bytes": self.stored_bytes,
            "matched": sum(site.matched for site in self.sites),
        }

    def lines(self) -> Iterator[str | Table]:
        rows = [
            (
                view.site.name,
                view.site.kind,
                shape(view.site.shape),
                "-" if view.sparsity is None else f"{view.sparsity:.1%}",
                str(view.pattern or "-"),
                "yes" if view.matched else f"no: {view.reason}",
            )
            for view in self.sites
        ]
        yield Table(("site", "kind", "shape", "zeros", "pattern", "matched"), rows, left=2)
        yield from (f"  not a site: {line}" for line in grouped(self.others))
        taken = sum(view.matched for view in self.sites)
        kind = self.model_type if self.task is None else f"{self.model_type}, {self.task}"
        yield f"{kind}: {self.total:,} parameters, {len(self.sites)} sites, {taken} matched"


@links_option
def inspect(
    model: str | Path,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
) -> Inspected:
    """Describe the sites of a model folder; with config.json alone, without their patterns.

    Args:
        task: what the model is for; None: what its configuration says.
    """
    model = Path(model)
    weights = any(model.glob("*.safetensors"))
    found = find_sites(open_model(model, weights=weights), task=task, trust_remote_code=trust_remote_code)
    program = found.program
    seen: dict[str, tuple[PackedMask, Pattern | None]] = {}
    if weights:
        seen = scan_sites(found, [name for name in program.sites if name in found.matrices], tick)
    skipped = _skipped(found, weights)
    sites = [
        SiteView(
            site,
            program.patterns.get(name),
            _sparsity(found, name, seen),
            name not in skipped,
            skipped.get(name),
        )
        for name, site in program.sites.items()
    ]
    total = sum(parameter.numel() for parameter in program.parameters())
    nbytes = found.folder.stored_bytes if weights else None
    kind = None if program.untraced else program.task.name
    return Inspected(model, program.config.model_type, kind, sites, found.others, found.notes, total, nbytes)


def _skipped(found: ModelSites, weights: bool) -> dict[str, str]:
    """The sites that match skips, with its reasons; every site where it finds none to match."""
    unbound = {n: r for n, r in found.binding.refused.items() if n in found.program.sites} if weights else {}
    if not found.program.sites:
        return unbound
    try:
        (report,) = run_pipeline(found.program, [Match(dense=not weights)])
    except SppFxError:
        (report,) = run_pipeline(found.program, [Match(dense=True)])
        for name in report.changed:
            report.skipped[name] = "dense: it has no zeros to keep"
    return report.skipped | unbound


def _sparsity(
    found: ModelSites, name: str, seen: dict[str, tuple[PackedMask, Pattern | None]]
) -> float | None:
    masks = [seen[matrix.tensor][0] for matrix in found.matrices.get(name, ()) if matrix.tensor in seen]
    total = sum(mask.numel for mask in masks)
    return 1 - sum(mask.nnz for mask in masks) / total if total else None
