"""inject: an adapter folder for a pruned model."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from spp_fx.adapters.adapter_folder import write_adapter
from spp_fx.adapters.method import Method, initial_factor, make_method
from spp_fx.adapters.per_site import (
    RANK,
    check_ranked,
    method_by_site,
    parse_budget,
    parse_override,
    rank_of,
    size_of,
    spread,
    unspent,
    with_rank,
)
from spp_fx.console import Table, grouped, shape
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.leaves import sites_in_leaves
from spp_fx.graph.program import Site
from spp_fx.graph.task import CAUSAL_LM, find_task, task_of
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.inject_adapters import adaptable
from spp_fx.pruning.layerwise import Tick as StepTick
from spp_fx.pruning.layerwise import silent
from spp_fx.sparsity.lock import Lock
from spp_fx.sparsity.pattern import Pattern
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import Say, workspace
from spp_fx.verbs.load import device_of, samples_digest
from spp_fx.verbs.pruned import choose_pruned, lock_of, refuse_sparse_teacher, stored_tensors, trained_vectors
from spp_fx.verbs.settings import Calibration, InjectSettings
from spp_fx.verbs.starts import TextGradients, check_start, start_factors
from spp_fx.verification import provenance
from spp_fx.verification.model_sites import ModelSites, find_sites, tensors_of

_MOST = 0.9
"""The share of a budget below which inject says why the rest is not used."""


@dataclass(frozen=True)
class Injected:
    """The result of inject, or what it would do.

    Attributes:
        out: the adapter folder, None for a dry run.
        method: with the options that sites have by default.
        methods: of each adapted site.
        budget: whether a budget chose the ranks.
        trained: norms and biases that are trained themselves, with their sizes.
        sites: the adapted sites, each with the pattern found (None where no weight was read).
        refused: the other sites, each with the reason.
        trainable: number of parameters in all factors, norms and biases.
        total: number of parameters of the model.
    """

    out: Path | None
    method: Method
    methods: dict[str, Method]
    budget: bool
    trained: dict[str, int]
    sites: dict[str, tuple[Site, Pattern | None]]
    refused: dict[str, str]
    trainable: int
    total: int

    @property
    def ranks(self) -> list[int]:
        """Those that sites have, ascending; empty for a method without a rank."""
        return sorted({rank_of(own) for own in self.methods.values() if RANK in own.parameters()})

    def to_json(self) -> dict[str, Any]:
        ranks = self.ranks
        return {
            "out": None if self.out is None else str(self.out),
            "method": self.method.name,
            **self.method.parameters(),
            **({RANK: ranks[0] if len(ranks) == 1 else None} if self.budget else {}),
            "sites": [
                {
                    "name": name,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "pattern": None if pattern is None else str(pattern),
                    "trainable_parameters": size_of(self.methods[name], site.shape),
                    **self.methods[name].parameters(),
                }
                for name, (site, pattern) in self.sites.items()
            ],
            "trained": [{"name": name, "parameters": size} for name, size in self.trained.items()],
            "refused": self.refused,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "per_mille": 1000 * self.trainable / self.total,
        }

    def lines(self) -> Iterator[str | Table]:
        if self.out is None:
            differing = [
                key
                for key, value in self.method.parameters().items()
                if key == RANK or any(getattr(own, key) != value for own in self.methods.values())
            ]
            rows = [
                (
                    name,
                    site.kind,
                    shape(site.shape),
                    str(pattern or "-"),
                    *(f"{getattr(self.methods[name], key)}" for key in differing),
                    f"{size_of(self.methods[name], site.shape):,}",
                )
                for name, (site, pattern) in self.sites.items()
            ]
            yield Table(("site", "kind", "shape", "pattern", *differing, "trainable"), rows)
        yield (
            f"{'would train' if self.out is None else f'{self.out}:'} {self.trainable:,} parameters over "
            f"{len(self.sites)} weights, {self.trainable / self.total:.2%} of {self.total:,}"
        )
        if ranks := self.ranks if self.budget or len(self.ranks) > 1 else []:
            yield f"  rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        if self.trained:
            yield f"  {sum(self.trained.values()):,} of them in {len(self.trained)} norms and biases"
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
    overrides: Sequence[str] = (),
    task: str | None = None,
    train_norms: bool = False,
    budget: str | int | None = None,
    budget_by: Literal["size", "error", "gradient"] = "size",
    teacher: str | Path | None = None,
    init: Literal["default", "gradient", "reconstruct"] = "default",
    calibration: Calibration | None = None,
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
        overrides: other values of the method's numbers for some sites, such as `rank:down_proj@32`; see
            `method_by_site`.
        task: what the model is for; None: what its configuration says.
        train_norms: also train norms and biases, see `vectors`.
        budget: trained parameters at most, such as `0.3%` of the model's; the ranks are chosen, see `spread`.
        budget_by: what the ranks are in proportion to: `size`, the same for all; `error`, see `pruning_errors`;
            `gradient`, the norm of W * G on a text.
        teacher: the dense model's folder, for `error` and `reconstruct`; for `gradient`, a model whose predictions
            are learned instead of the text's own tokens.
        init: the start of the factors: `default`; `gradient`, see `Method.gradient_start`; or `reconstruct`, see
            `start_by_reconstruction`.
        calibration: the text for gradients and reconstruction.
        device: where layers run for them; by default a GPU if torch has one.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        say: called with notes for the user.
        options: of the method, such as `rank`.

    Raises:
        UsageError: unknown method, option or target, a rank that fits no site, an output that exists.
        PatternError: the model is dense.
        MaskError: the model is not the one its own lock describes.
    """
    model, out = Path(model), None if out is None else Path(out)
    asked = InjectSettings(
        method=method, seed=seed, targets=tuple(targets), skip=tuple(skip), train_norms=train_norms, init=init,
        budget=None if budget is None else str(budget), budget_by=budget_by,
        teacher=None if teacher is None else str(teacher), device=device,
    )  # fmt: skip
    walks = asked.walks(dry_run=out is None)
    asked.check_text(calibration, dry_run=out is None)
    plan = _Plan(make_method(method, **options), tuple(overrides), asked)
    plan.check(options)

    def walked(found: ModelSites, store: Path) -> TextGradients | None:
        if calibration is None or not walks:
            return None
        where = device_of(device)
        return TextGradients(
            found, calibration, plan.teacher, where, store, trust_remote_code, walk_tick, say
        )

    if out is None:
        weights = any(model.glob("*.safetensors"))
        found = find_sites(
            open_model(model, weights=weights), task=task, trust_remote_code=trust_remote_code, runnable=walks
        )
        with TemporaryDirectory(prefix="spp-fx-inject-") as store:
            return _inject(found, None, plan, tick, say, walked(found, Path(store)))[0]
    provenance.load(model)  # a damaged history is an error before the work
    sources = [model] if plan.teacher is None else [model, plan.teacher]
    with workspace(out, {"verb": "inject"}, force=force, sources=sources, say=say) as work:
        found = find_sites(open_model(model), task=task, trust_remote_code=trust_remote_code, runnable=walks)
        gradients = walked(found, work.store)
        result, lock = _inject(found, out, plan, tick, say, gradients)
        factors = {
            f"{name}.{key}": initial_factor(spec, f"{name}.{key}", seed, torch.device("cpu"))
            for name, (site, _) in result.sites.items()
            for key, spec in result.methods[name].factors(site.shape).items()
        }
        trained = {name: stored_tensors(found, name) for name in result.trained}
        factors |= {name: _start(found, name, tensors) for name, tensors in trained.items()}
        fingerprint = found.folder.fingerprint()
        inputs, start = {"model": fingerprint}, dict[str, Any]()
        if plan.teacher is not None:
            inputs["teacher"] = open_model(plan.teacher).fingerprint()
        if gradients is not None:
            if init != "default":
                factors = start_factors(init, gradients, result.methods, factors)
            samples = gradients.samples
            inputs["calibration"] = samples_digest(samples)
            start = {"init": init, "samples": len(samples)}
            if isinstance(samples, Tensor):
                start["seq_len"] = samples.shape[1]
        # An outline has no task of its own.
        kind = find_task(task) if task else task_of(found.program.config) or find_task(CAUSAL_LM)
        write_adapter(
            work.folder,
            target=out,
            base=model,
            fingerprint=fingerprint,
            method=result.method,
            methods=result.methods,
            seed=seed,
            matrices={name: found.matrices[name] for name in result.sites},
            factors=factors,
            lock=lock,
            trained=trained,
            init=init,
            task=(kind.name, kind.peft),
        )
        settings = {
            "method": method, **result.method.parameters(), "seed": seed, "targets": list(targets), "skip": list(skip),
            **plan.more_settings(), **start,
        }  # fmt: skip
        provenance.record(model, work.folder, "inject", inputs=inputs, settings=settings, digests={})
    return result


@dataclass(frozen=True)
class _Plan:
    """What the caller asked for."""

    method: Method
    overrides: tuple[str, ...]
    asked: InjectSettings

    def check(self, given: Iterable[str]) -> None:
        """Check what the method allows, before any work; `given` are options of the method."""
        check_start(self.method, self.asked.init)
        ranked = [rule.option for rule in (parse_override(self.method, text) for text in self.overrides)]
        if self.asked.budget is not None:
            check_ranked(self.method)
            if RANK in {*given, *ranked}:
                raise UsageError("--budget chooses the ranks; leave --rank out")

    @property
    def teacher(self) -> Path | None:
        return None if self.asked.teacher is None else Path(self.asked.teacher)

    def more_settings(self) -> dict[str, Any]:
        """What the history keeps, where it is not as by default."""
        asked = self.asked
        budget = {} if asked.budget is None else {"budget": asked.budget, "budget_by": asked.budget_by}
        overrides = {"overrides": list(self.overrides)} if self.overrides else {}
        return overrides | budget | ({"train_norms": True} if asked.train_norms else {})


def _inject(
    found: ModelSites, out: Path | None, plan: _Plan, tick: Tick, say: Say, gradients: TextGradients | None
) -> tuple[Injected, Lock]:
    for note in found.notes:
        say(note)
    program, asked = found.program, plan.asked
    total = sum(p.numel() for p in {id(p): p for p in program.parameters()}.values())
    chosen, refused, masks = choose_pruned(found, asked.targets, asked.skip, tick)
    if plan.teacher is not None and masks:
        refuse_sparse_teacher(found, chosen, plan.teacher, values=asked.compares)
    shapes = {name: program.sites[name].shape for name in chosen}
    methods = method_by_site(plan.method, plan.overrides, chosen)
    trained: dict[str, int] = {}
    if asked.train_norms:
        trained, others = trained_vectors(found)
        refused |= others
    if asked.budget is not None:
        left = parse_budget(asked.budget, total) - sum(trained.values())
        if left < 1:
            raise UsageError(
                f"--budget {asked.budget}: the norms and biases alone take {sum(trained.values()):,}"
            )
        weights = dict.fromkeys(chosen, 1.0)
        if asked.budget_by == "error" and plan.teacher is not None:
            weights = pruning_errors(found, plan.teacher, chosen, tick)
        elif asked.budget_by == "gradient" and gradients is not None:
            weights = gradients.norms(chosen)
        every = methods
        methods, without = spread(every, shapes, weights, left)
        used = sum(size_of(own, shapes[name]) for name, own in methods.items())
        if used < _MOST * left or without:
            why = unspent(every, shapes, weights, methods)
            say(f"--budget {asked.budget}: {used:,} of {left:,} parameters are used: {why}")
        refused |= without
        shapes = {name: shapes[name] for name in methods}
    taken, unfit = adaptable(methods, shapes, plan.overrides, sites_in_leaves(program))
    refused |= unfit | found.others
    sites = {name: (program.sites[name], program.patterns.get(name)) for name in taken}
    methods = {name: methods[name] for name in taken}
    lock = lock_of(found, sites, masks) if masks else Lock.of([])
    sizes = {name: size_of(methods[name], site.shape) for name, (site, _) in sites.items()}
    if above := {name: size for name, size in sizes.items() if size > prod(shapes[name])}:
        name, size = max(above.items(), key=lambda each: each[1] / prod(shapes[each[0]]))
        say(
            f"{len(above)} of {len(sites)} sites train more numbers than their weights have, such as {name}: {size:,} "
            f"for {shape(shapes[name])}; lower the rank, or train each weight itself with --method masked-full"
        )
    trainable = sum(sizes.values()) + sum(trained.values())
    method = plan.method
    if asked.budget is not None:
        ((rank, _),) = Counter(map(rank_of, methods.values())).most_common(1)
        method = with_rank(method, rank)
    return Injected(
        out, method, methods, asked.budget is not None, trained, sites, refused, trainable, total
    ), lock


def _start(found: ModelSites, parameter: str, tensors: Sequence[str]) -> torch.Tensor:
    """The base's value of a vector, in float32 at least."""
    value = found.folder.info(tensors[0])[0].read(tensors[0])
    if not bool(value.isfinite().all()):
        raise FormatError(
            f"{found.folder.path}: {tensors[0]} holds NaN or infinity; {parameter} cannot be trained"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32)).view(-1)


def pruning_errors(
    found: ModelSites, teacher: Path, sites: Iterable[str], tick: Tick = no_tick
) -> dict[str, float]:
    """What pruning took from each site: the Frobenius norm of dense - pruned; of a stack, per expert.

    Args:
        teacher: the dense model's folder, with the tensors of the pruned one.

    Raises:
        UsageError: a model has no weights.
        FormatError: the dense model has no such tensor, another shape, or values that are not finite.
    """
    if not found.folder.shards:
        raise UsageError(f"{found.folder.path}: --budget-by error reads the weights, and it has none")
    dense = open_model(teacher)
    errors: dict[str, float] = {}
    for site in sites:
        squares, tensors = 0.0, tensors_of(found.matrices[site])
        for name, matrix in tensors.items():
            if name not in dense:
                raise FormatError(
                    f"{teacher}: has no tensor {name}, so it is not the dense model of {found.folder.path}"
                )
            own, other = (each.info(name) for each in (found.folder, dense))
            if own[1].shape != other[1].shape:
                raise FormatError(
                    f"{teacher}: {name} has shape {list(other[1].shape)}, in {found.folder.path} {list(own[1].shape)}"
                )
            difference = (other[0].read(name).float() - own[0].read(name).float())[matrix.held]
            squares += float(difference.square().sum(dtype=torch.float64))
            tick(name, own[1].nbytes + other[1].nbytes)
        experts = found.program.sites[site].shape[:-2]
        errors[site] = sqrt(squares / prod(experts))
        if not isfinite(errors[site]):
            raise FormatError(
                f"{site}: differs from the dense model by {errors[site]}; a weight is not finite"
            )
    return errors
