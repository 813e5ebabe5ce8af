"""inject: an adapter folder for a pruned model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spp_fx.adapters.adapter_folder import write_adapter
from spp_fx.adapters.method import Method, initial_factor, make_method
from spp_fx.console import Table, grouped, shape
from spp_fx.errors import MaskError, SppFxError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.names import without_skipped
from spp_fx.graph.program import Site
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.inject_adapters import adaptable
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.layerwise import Tick as StepTick
from spp_fx.pruning.layerwise import silent
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, compare, lock_beside, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import Say, workspace
from spp_fx.verbs.load import device_of, draw_windows, text_digest
from spp_fx.verbs.settings import Calibration
from spp_fx.verbs.starts import (
    check_reachable,
    check_start,
    check_teacher,
    partition,
    site_gradients,
    start_from_gradients,
    walkable,
)
from spp_fx.verification import provenance
from spp_fx.verification.model_sites import ModelSites, choose, find_sites, scan_sites


@dataclass(frozen=True)
class Injected:
    """The result of inject, or what it would do.

    Attributes:
        out: the adapter folder, None for a dry run.
        sites: the adapted sites, each with the pattern found (None where no weight was read).
        refused: the other sites, each with the reason.
        trainable: number of parameters in all factors.
        total: number of parameters of the model.
    """

    out: Path | None
    method: Method
    sites: dict[str, tuple[Site, Pattern | None]]
    refused: dict[str, str]
    trainable: int
    total: int

    @property
    def per_mille(self) -> float:
        return 1000 * self.trainable / self.total

    def to_json(self) -> dict[str, Any]:
        return {
            "out": None if self.out is None else str(self.out),
            "method": self.method.name,
            **self.method.parameters(),
            "sites": [
                {
                    "name": name,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "pattern": None if pattern is None else str(pattern),
                    "trainable_parameters": _size(self.method, site),
                }
                for name, (site, pattern) in self.sites.items()
            ],
            "refused": self.refused,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "per_mille": self.per_mille,
        }

    def lines(self) -> Iterator[str | Table]:
        if self.out is None:
            rows = [
                (name, site.kind, shape(site.shape), str(pattern or "-"), f"{_size(self.method, site):,}")
                for name, (site, pattern) in self.sites.items()
            ]
            yield Table(("site", "kind", "shape", "pattern", "trainable"), rows)
        yield (
            f"{'would train' if self.out is None else f'{self.out}:'} {self.trainable:,} parameters over "
            f"{len(self.sites)} weights, {self.per_mille:.2f} per mille of {self.total:,}"
        )
        yield from (f"  not taken: {line}" for line in grouped(self.refused))


@links_option
def inject(
    model: str | Path,
    out: str | Path | None,
    *,
    method: str = "spp",
    targets: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
    init: str = "default",
    calibration: Calibration | None = None,
    teacher: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    walk_tick: StepTick = silent,
    say: Say = lambda line: None,
    **options: Any,
) -> Injected:
    """Make an adapter folder for a pruned model folder, with a lock of its masks.

    Args:
        out: the folder to write; None for a dry run, which needs only config.json.
        targets: sites to adapt; see `Match`.
        skip: names of sites that get no adapter, as in `targets`.
        init: the start of the factors: `default`, or `gradient`, see `Method.gradient_start`.
        calibration: the text of the gradients.
        teacher: folder of a model whose predictions stand in for the text's own tokens.
        device: where layers run for `gradient`; by default a GPU if torch has one.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        say: called with notes for the user.
        options: of the method, such as `rank`.

    Raises:
        UsageError: unknown method, option or target, a rank that fits no site, an output that exists.
        PatternError: the model is dense.
        MaskError: the model is not the one its own lock describes.
    """
    model, out = Path(model), None if out is None else Path(out)
    if seed < 0:
        raise UsageError(f"--seed must not be negative, got {seed}")
    adapter = make_method(method, **options)
    _check_init(adapter, init, calibration, teacher, device, out)
    if out is None:
        weights = any(model.glob("*.safetensors"))
        found = find_sites(open_model(model, weights=weights), trust_remote_code=trust_remote_code)
        return _inject(found, None, adapter, targets, skip, tick, say)[0]
    provenance.load(model)  # a damaged history is an error before the work
    with workspace(out, {"verb": "inject"}, force=force, sources=[model], say=say) as work:
        found = find_sites(open_model(model), trust_remote_code=trust_remote_code, runnable=init != "default")
        result, lock = _inject(found, out, adapter, targets, skip, tick, say)
        factors = {
            f"{name}.{key}": initial_factor(spec, f"{name}.{key}", seed, torch.device("cpu"))
            for name, (site, _) in result.sites.items()
            for key, spec in adapter.factors(site.shape).items()
        }
        fingerprint = found.folder.fingerprint()
        inputs, start = {"model": fingerprint}, {}
        if calibration is not None:
            tokens = draw_windows(
                model, found.program, calibration, trust_remote_code=trust_remote_code, say=say
            ).tokens
            partition(found.program, model)
            check_reachable(found.program, result.sites)
            guide = None
            if teacher is not None:
                guide = walkable(Path(teacher), trust_remote_code=trust_remote_code)
                check_teacher(found.program, guide.program, Path(teacher))
                inputs["teacher"] = guide.folder.fingerprint()
            gradients = site_gradients(
                found, result.sites, tokens, device=device_of(device), store=work.store, teacher=guide, tick=walk_tick,
            )  # fmt: skip
            factors = start_from_gradients(gradients, dict.fromkeys(result.sites, adapter), factors)
            inputs["calibration"] = text_digest(tokens)
            start = {"init": init, "samples": len(tokens), "seq_len": tokens.shape[1]}
        write_adapter(
            work.folder,
            target=out,
            base=model,
            fingerprint=fingerprint,
            method=adapter,
            seed=seed,
            matrices={name: found.matrices[name] for name in result.sites},
            factors=factors,
            lock=lock,
            init=init,
        )
        settings = {
            "method": method, **adapter.parameters(), "seed": seed, "targets": list(targets), "skip": list(skip),
            **start,
        }  # fmt: skip
        provenance.record(model, work.folder, "inject", inputs=inputs, settings=settings, digests={})
    return result


def _inject(
    found: ModelSites,
    out: Path | None,
    adapter: Method,
    targets: Sequence[str],
    skip: Sequence[str],
    tick: Tick,
    say: Say,
) -> tuple[Injected, Lock]:
    for note in found.notes:
        say(note)
    program = found.program
    total = sum(p.numel() for p in {id(p): p for p in program.parameters()}.values())
    chosen, refused = choose(found, Match(targets=tuple(targets), dense=True))
    chosen, skipped = without_skipped(chosen, skip, known=[*program.sites, *found.others])
    refused |= skipped
    masks = scan_sites(found, chosen, tick) if found.folder.shards else {}
    if masks:
        (report,) = run_pipeline(program, [Match(targets=tuple(chosen))])
        refused |= {name: reason for name, reason in report.skipped.items() if name in chosen}
        chosen = list(program.matched)
    taken, unfit = adaptable(adapter, {name: program.sites[name].shape for name in chosen})
    refused |= unfit | found.others
    sites = {name: (program.sites[name], program.patterns.get(name)) for name in taken}
    lock = _lock(found, sites, masks) if masks else Lock.of([])
    trainable = sum(_size(adapter, site) for site, _ in sites.values())
    return Injected(out, adapter, sites, refused, trainable, total), lock


def _check_init(
    method: Method,
    init: str,
    calibration: Calibration | None,
    teacher: str | Path | None,
    device: str | None,
    out: Path | None,
) -> None:
    """UsageError for options of the start that do not go together."""
    if init == "default":
        given = {"--calib": calibration, "--teacher": teacher, "--device": device}
        if unused := [option for option, value in given.items() if value is not None]:
            raise UsageError(f"{unused[0]} is for --init gradient; the default start needs no model")
        return
    check_start(method, init)
    if out is None:
        raise UsageError(f"--dry-run needs no weights, --init {init} does; leave out one of them")
    if calibration is None:
        raise UsageError(f"--init {init} needs a text: give it with --calib FILE")


def _size(method: Method, site: Site) -> int:
    return sum(spec.numel for spec in method.factors(site.shape).values())


def _lock(
    found: ModelSites, sites: Iterable[str], masks: Mapping[str, tuple[PackedMask, Pattern | None]]
) -> Lock:
    """The lock of the tensors of sites; they must hold the model's own lock if there is one."""
    path = found.folder.path / LOCK_NAME
    own = lock_beside(found.folder.path)
    known = own.by_name() if own else {}
    entries: dict[str, LockEntry] = {}
    for site in sites:
        kind = found.program.sites[site].kind
        for matrix in found.matrices[site]:
            mask, pattern = masks[matrix.tensor]
            entries[matrix.tensor] = make_entry(matrix.tensor, kind, mask, pattern, matrix.transposed)
    if known and not any(name in found.folder for name in known):
        raise SppFxError(
            f"{path}: is the lock of another model, since {found.folder.path} has none of its {len(known)} sites "
            f"(first: {next(iter(known))}); remove it, or replace it by the right one"
        )
    for name, entry in entries.items():
        if name not in known:  # pruned by another tool since: locked from now on
            continue
        difference = compare(known[name], masks[name][0])
        if not difference.equal:
            raise MaskError(
                f"{name}: its mask is not that of {path} ({difference.reason or 'zeros moved'}); see 'spp-fx verify', "
                "or remove the lock if the model was changed on purpose"
            )
        entries[name] = entry.model_copy(update={"pattern": known[name].pattern})
    if not entries:
        raise SppFxError("inject: no site has a stored tensor")
    return Lock.of(entries.values())
