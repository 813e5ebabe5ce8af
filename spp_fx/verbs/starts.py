"""The starts of an adapter's factors that need the model and a text: from gradients, or by least squares."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod, sqrt
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from spp_fx.adapters.method import Method
from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.program import Program
from spp_fx.passes.causal import Causal
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.gradients import SiteGradient, Source, layer_gradients, without_gradient
from spp_fx.pruning.layerwise import Tick, silent
from spp_fx.pruning.least_squares import Solved, check_linear, layer_inputs, solve_rows
from spp_fx.pruning.walk import FileStates, Samples, Walk
from spp_fx.verbs.load import FolderWeights, check_teacher, draw_samples
from spp_fx.verbs.settings import Calibration
from spp_fx.verification.model_sites import ModelSites, find_sites

_PROBE = 1024
"""Rows and columns of a weight that options are tried on before a model is read."""


def check_start(method: Method, init: str) -> None:
    """UsageError unless a method has a start of this name."""
    if init == "reconstruct":
        shape = (_PROBE, _PROBE)
        if method.refusal(shape) is None:
            check_linear(method, shape)
        return
    if init == "default" or type(method).gradient_start is not Method.gradient_start:
        return
    specs = method.factors((_PROBE, _PROBE))
    reason = "its factors start at zero, and no other start keeps the weights"
    if any(spec.init != "zeros" for spec in specs.values()):
        reason = "it defines no gradient_start"
    raise UsageError(f"{method.name} has only its default start: {reason}. Leave out --init")


def walkable(folder: Path, task: str, *, trust_remote_code: bool = False) -> ModelSites:
    """A model folder whose decoder layers can be run one by one; its program computes once its tensors are filled in.

    Raises:
        UsageError: it cannot be traced, or is not made of layers that run one after another.
    """
    found = find_sites(open_model(folder), task=task, trust_remote_code=trust_remote_code, runnable=True)
    partition(found.program, folder)
    return found


def partition(program: Program, folder: Path) -> None:
    """Prepare a program for `site_gradients`; UsageError where its layers cannot be walked."""
    try:
        if not program.units:
            run_pipeline(program, [Partition(), Causal()])
        Walk(program, to_end=True)
    except (PreconditionError, PostconditionError) as error:
        raise UsageError(
            f"{folder}: gradients are taken layer by layer, which this model does not allow: {error}. Use the "
            "default start"
        ) from error


def check_reachable(program: Program, sites: Iterable[str]) -> None:
    """UsageError for a site whose gradient a walk over the layers does not give; names it."""
    if reasons := without_gradient(program, sites):
        name, reason = next(iter(reasons.items()))
        raise UsageError(
            f"{name}: {reason} ({len(reasons)} such sites); leave it out with --skip, or use the default start"
        )


def site_gradients(
    found: ModelSites,
    sites: Iterable[str],
    samples: Samples,
    *,
    device: torch.device,
    store: Path,
    teacher: ModelSites | None = None,
    tick: Tick = silent,
) -> Generator[SiteGradient, None, None]:
    """The gradients of a model folder's sites, the last layer first: `layer_gradients` with files for all it keeps.

        for each in site_gradients(walkable(folder), sites, samples, device=device, store=work.store):
            norms[each.site] = (each.weight.float() * each.grad).norm()

    Memory holds one layer. `store` takes what each layer reads of each sample, which for 128 windows of 2,048 tokens
    in bfloat16 is 0.5 MiB times the hidden size and the number of layers.

    Args:
        found, teacher: as `walkable` gives them.
        sites: names; see `check_reachable`.
        samples: as `draw_samples` gives them.
        device: where layers run.
        store: a folder; it is left as it was.
    """
    with _source(found, device, store) as source:
        if teacher is None:
            yield from layer_gradients(source, samples, [*sites], device=device, tick=tick)
            return
        with _source(teacher, device, store) as guide:
            yield from layer_gradients(source, samples, [*sites], device=device, teacher=guide, tick=tick)


@dataclass(frozen=True)
class TextGradients:
    """Gradients of a model folder's sites on data that is drawn and encoded once.

    Attributes:
        found: as `find_sites` gives it, runnable.
        teacher: the folder of a model whose predictions are learned; None: the text's own tokens.
        store: a folder for what walks keep.
    """

    found: ModelSites
    calibration: Calibration
    teacher: Path | None
    device: torch.device
    store: Path
    trust_remote_code: bool
    tick: Tick
    say: Callable[[str], None]

    @cached_property
    def samples(self) -> Samples:
        """What gradients are taken on; the program is ready to be walked from here on."""
        model, program = self.found.folder.path, self.found.program
        drawn, _ = draw_samples(
            model, program, self.calibration, trust_remote_code=self.trust_remote_code, say=self.say
        )
        partition(program, model)
        return drawn

    @cached_property
    def guide(self) -> ModelSites | None:
        if self.teacher is None:
            return None
        task = self.found.program.task.name
        guide = walkable(self.teacher, task, trust_remote_code=self.trust_remote_code)
        model = self.found.folder.path
        check_teacher(
            self.found.program, guide.program, model, self.teacher, trust_remote_code=self.trust_remote_code
        )
        return guide

    def of(self, sites: Iterable[str]) -> Generator[SiteGradient, None, None]:
        """One walk; UsageError where a site has no gradient or the model cannot be walked."""
        names, samples = [*sites], self.samples
        check_reachable(self.found.program, names)
        return site_gradients(
            self.found,
            names,
            samples,
            device=self.device,
            store=self.store,
            teacher=self.guide,
            tick=self.tick,
        )

    def norms(self, sites: Iterable[str]) -> dict[str, float]:
        """The Frobenius norm of W * G of each site; of a stack, per expert."""
        norms: dict[str, float] = {}
        for each in self.of(sites):
            norm = float((each.weight.float() * each.grad).norm())
            norms[each.site] = norm / sqrt(prod(each.weight.shape[:-2]))
            if not isfinite(norms[each.site]):
                raise UsageError(f"{each.site}: its gradient on the text is not finite; use another text")
        return norms


def start_factors(
    init: str, text: TextGradients, methods: Mapping[str, Method], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The start of the factors of all sites by name on disk.

    Args:
        init: `gradient` or `reconstruct`, which needs `text.teacher`.
        methods: of the sites; see `check_start`.
        factors: the default start; may hold more.

    Raises:
        UsageError: the model's layers cannot be walked, a site is not in them, or the teacher is another model.
    """
    if init == "gradient":
        return start_from_gradients(text.of(methods), methods, factors)
    assert text.teacher is not None
    task = text.found.program.task.name
    dense = find_sites(open_model(text.teacher), task=task, trust_remote_code=text.trust_remote_code)
    check_dense(text.found, dense, methods)
    done = start_by_reconstruction(
        text.found,
        dense,
        methods,
        text.samples,
        factors,
        device=text.device,
        store=text.store,
        tick=text.tick,
    )
    before, after = (fmean(pair[at] for pair in done.errors.values()) for at in (0, 1))
    text.say(
        f"output error on the calibration text, mean of {len(done.errors)} weights: {before:.2%} -> {after:.2%}"
    )
    return done.factors


@contextmanager
def _source(found: ModelSites, device: torch.device, store: Path) -> Generator[Source, None, None]:
    if device.type != "cpu":
        found.program.move_constants(torch.device("cpu"), device)
    with TemporaryDirectory(prefix="states-", dir=store) as folder:
        yield Source(found.program.eval(), FolderWeights(found), FileStates(Path(folder)))


@dataclass(frozen=True)
class Reconstructed:
    """Factors that bring each site's outputs on the calibration text close to the dense model's.

    Attributes:
        factors: by name on disk.
        errors: of each site, the squared error of its outputs before and after, relative to the squared norm of the
            dense weight's outputs; 0, 0 where they are all zero.
    """

    factors: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]


def start_by_reconstruction(
    found: ModelSites,
    dense: ModelSites,
    methods: Mapping[str, Method],
    samples: Samples,
    factors: Mapping[str, Tensor],
    *,
    device: torch.device,
    store: Path,
    tick: Tick = silent,
) -> Reconstructed:
    """The start of all factors, layer by layer, by `solve_rows`; each layer sees the outputs of those before it.

    The factors that are not solved for start along the singular vectors of the gradient of the same squared error,
    (W - W_dense) X Xᵀ, where the method has a start from gradients, and by default otherwise.

    Args:
        found: as `walkable` gives it.
        dense: the dense model.
        methods: of every site; see `check_start`.
        samples, device, store: as in `site_gradients`.
        factors: the default start, by name on disk.
    """
    check_reachable(found.program, methods)
    result, errors = dict(factors), dict[str, tuple[float, float]]()
    reader = FolderWeights(dense)
    with _source(found, device, store) as source:
        for each in layer_inputs(source, samples, [*methods], device=device, tick=tick):
            reader.fill(dense.program, [each.site], device)
            target = dense.program.canonical_weight(each.site)
            solved: list[Solved] = []
            names = {
                key: f"{each.site}.{key}" for key in methods[each.site].factors(tuple(each.weight.shape))
            }
            for expert in _experts(each.weight):
                own = {key: factors[name][expert].to(device) for key, name in names.items()}
                inputs = each.inputs.get(0 if expert is ... else expert)
                if inputs is None or inputs.hessian is None:  # an expert without tokens
                    solved.append(Solved(own, 0.0, 0.0, 0.0))
                    continue
                weight, wanted = each.weight[expert].float(), target[expert].float()
                solved.append(_reconstruct(methods[each.site], weight, wanted, inputs.hessian, own))
                change = methods[each.site].update(weight, **solved[-1].factors) * (weight != 0)
                each.weight[expert].copy_(weight + change)
            reader.empty(dense.program, [each.site])
            for key, name in names.items():
                result[name] = _joined([part.factors[key] for part in solved], each.weight)
            energy = sum(part.energy for part in solved) or 1.0
            errors[each.site] = (
                sum(part.before for part in solved) / energy,
                sum(part.after for part in solved) / energy,
            )
    return Reconstructed(result, errors)


def _reconstruct(
    method: Method, weight: Tensor, dense: Tensor, hessian: Tensor, factors: dict[str, Tensor]
) -> Solved:
    grad = (weight - dense) @ hessian
    return solve_rows(method, weight, dense, hessian, method.gradient_start(weight, grad, factors) or factors)


def check_dense(found: ModelSites, dense: ModelSites, sites: Iterable[str]) -> None:
    """UsageError unless a dense model has every site in the same shape; names the first that differs."""
    for name in sites:
        shape, other = found.program.sites[name].shape, dense.program.sites.get(name)
        if other is None or other.shape != shape:
            has = "has no such weight" if other is None else f"has shape {list(other.shape)}"
            raise UsageError(
                f"{name}: has shape {list(shape)}, {dense.folder.path} {has}; --teacher must be the dense model that "
                "the pruned one was made from"
            )


def _experts(weight: Tensor) -> Sequence[Any]:
    """The indices of the matrices of a weight: of each expert, or of the whole."""
    return range(weight.shape[0]) if weight.ndim == 3 else [...]


def _joined(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    return (torch.stack([*parts]) if weight.ndim == 3 else parts[0]).cpu()


def start_from_gradients(
    gradients: Iterable[SiteGradient], methods: Mapping[str, Method], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The start of all factors, each matrix of a stack by itself.

    Args:
        gradients: of every site.
        methods: of every site.
        factors: the default start, by name on disk: the site's, a dot, and the factor's.
    """
    result = dict(factors)
    for each in gradients:
        method = methods[each.site]
        names = {key: f"{each.site}.{key}" for key in method.factors(tuple(each.weight.shape))}
        default = {key: factors[name].to(each.grad.device) for key, name in names.items()}
        parts = [
            method.gradient_start(
                each.weight[at].float(), each.grad[at], {key: value[at] for key, value in default.items()}
            )
            for at in _experts(each.weight)
        ]
        if known := [part for part in parts if part is not None]:
            result |= {
                name: _joined([part[key] for part in known], each.weight) for key, name in names.items()
            }
    return result
