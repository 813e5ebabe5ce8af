"""prune: make a dense model folder sparse, tensor by tensor or decoder layer by decoder layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from spp_fx.adapters.adapter_folder import StoredMatrix
from spp_fx.console import Table, grouped
from spp_fx.errors import MaskError, UsageError
from spp_fx.exporters.manifest import open_model, sha256
from spp_fx.parallel import in_order
from spp_fx.passes.causal import Causal
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.criterion import CRITERIA, make_criterion
from spp_fx.pruning.layerwise import (
    LayerResult,
    Tick,
    outside_of_layers,
    prune_layers,
    silent,
)
from spp_fx.pruning.recipe import MatrixReport, Recipe, check_patterns, patterns_of, prune_matrix
from spp_fx.pruning.walk import Samples
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, make_entry
from spp_fx.sparsity.pattern import Pattern, parse_pattern, scan_bits
from spp_fx.sparsity.scan import scan_stored
from spp_fx.storage.folder import OWN_FILES, ModelFolder
from spp_fx.storage.links import links_option
from spp_fx.storage.safetensors import Shard, TensorInfo
from spp_fx.storage.workspace import Say, Workspace, check_output, workspace
from spp_fx.storage.writer import copy_others, rewrite_shard, write_shards
from spp_fx.verbs.layers import LayerStore
from spp_fx.verbs.load import Calibration, FolderWeights, device_of, draw_samples, samples_digest
from spp_fx.verification import provenance
from spp_fx.verification.model_sites import ModelSites, choose, find_sites, tensors_of


@dataclass(frozen=True)
class Pruned:
    """The result of prune.

    Attributes:
        out: the folder written.
        pattern: of every pruned weight for which no ratio gives another.
        lock: as written.
        refused: sites that were skipped and stay dense, each with the reason.
        reports: of each matrix, by stored tensor; a stack that is stored whole has several.
        calibration: number of samples, and length of windows of text, if any.
        skipped_rows: number of rows without content in the calibration data; None without such data.
    """

    out: Path
    pattern: Pattern
    lock: Lock
    refused: dict[str, str]
    reports: dict[str, list[MatrixReport]]
    calibration: dict[str, int] | None = None
    skipped_rows: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "pattern": str(self.pattern),
            "calibration": self.calibration,
            "skipped_rows": self.skipped_rows,
            "sites": [
                {
                    "name": e.name,
                    "shape": list(e.shape),
                    "nnz": e.nnz,
                    "sparsity": 1 - e.nnz / torch.Size(e.shape).numel(),
                    "pattern": str(e.pattern),
                    **self.errors(e.name),
                    "notes": list(dict.fromkeys(n for report in self.reports[e.name] for n in report.notes)),
                }
                for e in self.lock.sites
            ],
            "refused": self.refused,
        }

    def lines(self) -> Iterator[str | Table]:
        content = self.to_json()
        sites = content["sites"]
        if self.calibration is not None:
            shown = {"error_before": "output error: mask alone", "error_after": "in the end"}
            if all(site["error_before"] == site["error_after"] for site in sites):  # no update, no repair
                shown = {"error_after": "output error"}
            rows = [
                (
                    site["name"],
                    site["pattern"],
                    f"{site['sparsity']:.2%}",
                    *("" if site[key] is None else f"{site[key]:.4%}" for key in shown),
                )
                for site in sites
            ]
            yield Table(("weight", "pattern", "zeros", *shown.values()), rows)
        zeros = 1 - sum(site["nnz"] for site in sites) / sum(prod(site["shape"]) for site in sites)
        patterns = ", ".join(dict.fromkeys(site["pattern"] for site in sites))
        yield f"{self.out}: {len(sites)} weights hold {patterns}, {zeros:.1%} of them zeros"
        for note in dict.fromkeys(note for site in sites for note in site["notes"]):
            yield from (
                f"  {line}" for line in grouped({s["name"]: note for s in sites if note in s["notes"]})
            )
        yield from (f"  left dense: {line}" for line in grouped(self.refused))

    def errors(self, tensor: str) -> dict[str, float | None]:
        """The squared error of a weight's outputs on the calibration inputs, relative to the outputs' squared norm.

        `error_before` is that of the first mask alone, `error_after` that after update and repair; both are None
        without calibration.
        """
        reports = self.reports[tensor]
        energy = sum(report.energy or 0 for report in reports)
        if not energy:
            return {"error_before": None, "error_after": None}
        return {
            "error_before": sum(report.lost_before or 0 for report in reports) / energy,
            "error_after": sum(report.lost_after or 0 for report in reports) / energy,
        }


@links_option
def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    pattern: str,
    calibration: Calibration | None = None,
    repair: str | None = None,
    update: str | None = None,
    targets: Sequence[str] = (),
    ratios: Sequence[str] = (),
    skip: Sequence[str] = (),
    task: str | None = None,
    device: str | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = silent,
    say: Say = lambda line: None,
    **options: Any,
) -> Pruned:
    """Prune every matched site of a model folder and write the lock beside the weights.

    Without calibration, tensor by tensor. With it, layer by layer: each is run on the outputs of the
    pruned layers before it, pruned, and run again; memory holds the weights of one layer. When a run was stopped, the
    next one continues after its finished layers or weight files and writes the same bytes.

    Args:
        method: name of a criterion.
        pattern: N:M or a share of zeros.
        repair: `dsnot`, or none.
        update: `admm`, or none.
        targets: sites to prune; see `Match`.
        ratios: `NAME@PATTERN`: another pattern for the sites of that name; the last one that matches counts.
        skip: names of sites that stay dense.
        task: what the model is for; None: what its configuration says.
        device: where layers run; by default a GPU if torch has one.
        fresh: start over even if a stopped run has finished something.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        say: called with notes for the user while it runs.
        options: of the criterion, by the names of its fields.

    Raises:
        UsageError: an option is wrong, the text too short, or the output exists.
        PatternError: the pattern does not divide a site's input features, or a site cannot be pruned; names it.
        MaskError: what was read back does not hold its pattern.
    """
    model, out, wanted = Path(model), Path(out), parse_pattern(pattern)
    recipe = Recipe(make_criterion(method, **options), repair, update)
    if recipe.calibrated and calibration is None:
        raise UsageError(f"{update or repair or method} needs calibration text: give it with --calib FILE")
    check_output(out, force, [model], say)
    provenance.load(model)  # a damaged history is an error before the work
    where = device_of(device)
    folder = open_model(model)
    found = find_sites(
        folder, task=task, trust_remote_code=trust_remote_code, runnable=calibration is not None
    )
    for note in found.notes:
        say(note)
    patterns, refused = _patterns(found, wanted, recipe, targets, ratios, skip, calibration is not None)
    plan = _plan(found, patterns, recipe)
    samples, skipped_rows = None, None
    if calibration is not None:
        samples, skipped = draw_samples(
            model, found.program, calibration, trust_remote_code=trust_remote_code, say=say
        )
        skipped_rows = skipped.count
        plan |= _calibration_plan(samples, where)
    need = found.folder.stored_bytes
    inputs = [shard.path for shard in found.folder.shards]
    with workspace(
        out, plan, force=force, fresh=fresh, sources=[model], inputs=inputs, need=need, say=say
    ) as work:
        if samples is None:
            by_tensor = _stream(found, patterns, recipe, work, tick)
        else:
            by_tensor = _walk(found, patterns, recipe, samples, work, where, tick)
        copy_others(found.folder, work.folder, skip=OWN_FILES)
        lock = _lock_folder(ModelFolder.open(work.folder), found, patterns)
        (work.folder / LOCK_NAME).write_text(lock.dumps())
        settings = {
            "method": method, "pattern": str(wanted), "repair": repair, "update": update, **_all_options(), **options,
            "targets": list(targets), "ratios": list(ratios), "skip": list(skip),
            **({} if task is None else {"task": task}),
        }  # fmt: skip
        _record(found, work.folder, settings, samples)
    used = None if samples is None else {"samples": len(samples)}
    if used is not None and isinstance(samples, Tensor):
        used["seq_len"] = samples.shape[1]
    return Pruned(out, wanted, lock, refused, by_tensor, used, skipped_rows)


def _patterns(
    found: ModelSites,
    wanted: Pattern,
    recipe: Recipe,
    targets: Sequence[str],
    ratios: Sequence[str],
    skip: Sequence[str],
    calibrated: bool,
) -> tuple[dict[str, Pattern], dict[str, str]]:
    """The pattern of each site to prune, and why the others are not pruned."""
    matched, refused = choose(found, Match(targets=tuple(targets), dense=True))
    refused |= found.others
    if calibrated:
        run_pipeline(found.program, [Partition(), Causal()])
        outside = outside_of_layers(found.program, matched)
        refused |= outside
        matched = [name for name in matched if name not in outside]
        if not matched:
            raise UsageError(f"no site can be calibrated: {'; '.join(sorted(set(outside.values())))}")
    patterns, skipped = patterns_of(matched, wanted, ratios, skip)
    check_patterns(found.program.sites, patterns, recipe.criterion)
    _check_stored_together(found, patterns)
    return patterns, refused | skipped


def _check_stored_together(found: ModelSites, patterns: Mapping[str, Pattern]) -> None:
    """UsageError unless sites that are stored as one tensor have one pattern: a lock has one for each tensor."""
    groups: dict[str, list[str]] = {}
    for name, matrices in found.matrices.items():
        if matrices[0].offset is not None:
            groups.setdefault(matrices[0].tensor, []).append(name)
    for tensor, names in groups.items():
        if len({str(patterns.get(name)) for name in names}) > 1:
            raise UsageError(
                f"{', '.join(names)} are stored as one tensor, {tensor}: give all of them the same pattern, or none"
            )


def _all_options() -> dict[str, None]:
    """The options of every criterion as None: a history also lists those that were not given."""
    return {option.name: None for criterion in CRITERIA.values() for option in fields(criterion)}


def _record(found: ModelSites, folder: Path, settings: Mapping[str, Any], samples: Samples | None) -> None:
    """Add this step to the model's history, with the digests of the files on disk."""
    inputs = {"model": found.folder.fingerprint()}
    if samples is not None:
        inputs["calibration"] = samples_digest(samples)
    names = [shard.name for shard in found.folder.shards]
    digests = in_order(sha256, (folder / name for name in names))
    provenance.record(
        found.folder.path,
        folder,
        "prune",
        inputs=inputs,
        settings=settings,
        digests=dict(zip(names, digests, strict=True)),
    )


def _plan(found: ModelSites, patterns: Mapping[str, Pattern], recipe: Recipe) -> dict[str, Any]:
    return {
        "verb": "prune",
        "base": found.folder.fingerprint(),
        "config": found.folder.config,
        "criterion": {"name": recipe.criterion.name, **asdict(recipe.criterion)},
        "repair": recipe.repair,
        "update": recipe.update,
        "patterns": {name: str(pattern) for name, pattern in patterns.items()},
    }


def _calibration_plan(samples: Samples, device: torch.device) -> dict[str, Any]:
    """What the outputs of layers depend on too."""
    return {
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples": samples_digest(samples),
        "shape": list(samples.shape) if isinstance(samples, Tensor) else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _stream(
    found: ModelSites, patterns: Mapping[str, Pattern], recipe: Recipe, work: Workspace, tick: Tick
) -> dict[str, list[MatrixReport]]:
    """Prune tensor by tensor, without inputs; returns the reports by stored tensor."""
    owners: dict[str, dict[str, StoredMatrix]] = {}
    for site in patterns:
        for matrix in found.matrices[site]:
            owners.setdefault(matrix.tensor, {})[site] = matrix
    done, total = 0, sum(name in owners for shard in found.folder.shards for name in shard.header.tensors)

    def write(shard: Shard, target: Path) -> dict[str, Any]:
        reports: dict[str, list[MatrixReport]] = {}

        def replace(info: TensorInfo) -> Tensor | None:
            nonlocal done
            if info.name not in owners:
                return None
            weight = shard.read(info.name)
            reports[info.name] = []
            for site, matrix in owners[info.name].items():
                canonical = (weight.transpose(-1, -2) if matrix.transposed else weight)[matrix.held]
                blocks = list(canonical) if canonical.ndim == 3 else [canonical]
                reports[info.name] += [
                    prune_matrix(values, None, patterns[site], recipe, info.name, i if matrix.whole else None)
                    for i, values in enumerate(blocks)
                ]
            done += 1
            tick(done, total, info.name)
            return weight

        rewrite_shard(shard, target, replace)
        return {"reports": {name: [each.to_json() for each in every] for name, every in reports.items()}}

    return {
        name: [MatrixReport.from_json(each) for each in every]
        for facts in write_shards(found.folder, work.folder, write, work)
        for name, every in facts["reports"].items()
    }


def _walk(
    found: ModelSites,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    samples: Samples,
    work: Workspace,
    device: torch.device,
    tick: Tick,
) -> dict[str, list[MatrixReport]]:
    """Prune layer by layer; returns the reports by stored tensor."""
    store = LayerStore(work, found)

    def finish(index: int, result: LayerResult) -> None:
        store.finish(index, result.tensors, {"reports": [each.to_json() for each in result.reports]})

    if device.type != "cpu":
        found.program.move_constants(torch.device("cpu"), device)
    prune_layers(
        found.program.eval(), samples, patterns, recipe, weights=FolderWeights(found),
        states=store.states, device=device, start=store.done, finish=finish, tick=tick,
    )  # fmt: skip
    store.write()
    by_site: dict[str, list[MatrixReport]] = {}
    for report in (MatrixReport.from_json(each) for facts in store.facts() for each in facts["reports"]):
        by_site.setdefault(report.site, []).append(report)
    by_tensor: dict[str, list[MatrixReport]] = {}
    for site in patterns:
        for tensor, matrix in tensors_of(found.matrices[site]).items():
            by_tensor.setdefault(tensor, []).extend(
                r
                for r in by_site[site]
                if matrix.whole or (r.expert, r.start) == (matrix.expert, matrix.start)
            )
    return by_tensor


def _lock_folder(folder: ModelFolder, found: ModelSites, patterns: Mapping[str, Pattern]) -> Lock:
    """The lock of a written folder, from its own bytes; MaskError if a mask does not hold its pattern."""
    entries: dict[str, LockEntry] = {}
    for site, pattern in patterns.items():
        for matrix in tensors_of(found.matrices[site]).values():
            if matrix.tensor in entries:
                continue
            mask = scan_stored(
                folder.info(matrix.tensor)[0], matrix.tensor, transposed=matrix.transposed
            ).mask
            violations = scan_bits(mask, pattern)
            if violations.count:
                raise MaskError(f"{matrix.tensor}: read back from disk: {violations.describe(pattern)}")
            kind = found.program.sites[site].kind
            entries[matrix.tensor] = make_entry(matrix.tensor, kind, mask, pattern, matrix.transposed)
    return Lock.of(entries.values())
