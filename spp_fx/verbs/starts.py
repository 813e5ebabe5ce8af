"""The starts of an adapter's factors that need the model and a text."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

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
from spp_fx.pruning.walk import FileStates, Walk
from spp_fx.verbs.load import FolderWeights
from spp_fx.verification.model_sites import ModelSites, find_sites


def check_start(method: Method, init: str) -> None:
    """UsageError unless a method has a start of this name."""
    if init == "default" or type(method).gradient_start is not Method.gradient_start:
        return
    specs = method.factors((64 * 64, 64 * 64))
    reason = "its factors start at zero, and no other start keeps the weights"
    if any(spec.init != "zeros" for spec in specs.values()):
        reason = "it defines no gradient_start"
    raise UsageError(f"{method.name} has only its default start: {reason}. Leave out --init")


def walkable(folder: Path, *, trust_remote_code: bool = False) -> ModelSites:
    """A model folder whose decoder layers can be run one by one; its program computes once its tensors are filled in.

    Raises:
        UsageError: it cannot be traced, or is not made of layers that run one after another.
    """
    found = find_sites(open_model(folder), trust_remote_code=trust_remote_code, runnable=True)
    partition(found.program, folder)
    return found


def partition(program: Program, folder: Path) -> None:
    """Prepare a program for `site_gradients`; UsageError where its layers cannot be walked."""
    try:
        run_pipeline(program, [Partition(), Causal()])
        Walk(program, to_end=True)
    except (PreconditionError, PostconditionError) as error:
        raise UsageError(
            f"{folder}: gradients are taken layer by layer, which this model does not allow: {error}. Use the "
            "default start"
        ) from error


def check_teacher(student: Program, teacher: Program, folder: Path) -> None:
    """UsageError if a teacher's predictions are not about the same tokens."""
    if teacher.vocabulary != student.vocabulary:
        raise UsageError(
            f"{folder}: its vocabulary has {teacher.vocabulary} tokens, the student's {student.vocabulary}; a teacher "
            "must share the tokenizer"
        )


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
    tokens: Tensor,
    *,
    device: torch.device,
    store: Path,
    teacher: ModelSites | None = None,
    tick: Tick = silent,
) -> Generator[SiteGradient, None, None]:
    """The gradients of a model folder's sites, the last layer first: `layer_gradients` with files for all it keeps.

        for each in site_gradients(walkable(folder), sites, tokens, device=device, store=work.store):
            norms[each.site] = (each.weight.float() * each.grad).norm()

    Memory holds one layer. `store` takes what each layer reads of each sample, which for 128 windows of 2,048 tokens
    in bfloat16 is 0.5 MiB times the hidden size and the number of layers.

    Args:
        found, teacher: as `walkable` gives them.
        sites: names; see `check_reachable`.
        tokens: (samples, length) int64, as `draw_windows` gives them.
        device: where layers run.
        store: a folder; it is left as it was.
    """
    with _source(found, device, store) as source:
        if teacher is None:
            yield from layer_gradients(source, tokens, [*sites], device=device, tick=tick)
            return
        with _source(teacher, device, store) as guide:
            yield from layer_gradients(source, tokens, [*sites], device=device, teacher=guide, tick=tick)


@contextmanager
def _source(found: ModelSites, device: torch.device, store: Path) -> Generator[Source, None, None]:
    if device.type != "cpu":
        found.program.move_constants(torch.device("cpu"), device)
    with TemporaryDirectory(prefix="states-", dir=store) as folder:
        yield Source(found.program.eval(), FolderWeights(found), FileStates(Path(folder)))


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
        experts = range(each.weight.shape[0]) if each.weight.ndim == 3 else [...]
        parts = [
            method.gradient_start(
                each.weight[at].float(), each.grad[at], {key: value[at] for key, value in default.items()}
            )
            for at in experts
        ]
        for key, name in names.items():
            own = [part[key] for part in parts if part is not None]
            result[name] = (torch.stack(own) if each.weight.ndim == 3 else own[0]).cpu()
    return result
