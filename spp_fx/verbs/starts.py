"""The starts of an adapter's factors that need the model and a text."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod, sqrt
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
from spp_fx.verbs.load import FolderWeights, draw_windows
from spp_fx.verbs.settings import Calibration
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
        if not program.units:
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


@dataclass(frozen=True)
class TextGradients:
    """Gradients of a model folder's sites on a text that is drawn and tokenized once.

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
    def tokens(self) -> Tensor:
        """(samples, length) int64; the program is ready to be walked from here on."""
        model, program = self.found.folder.path, self.found.program
        drawn = draw_windows(
            model, program, self.calibration, trust_remote_code=self.trust_remote_code, say=self.say
        )
        partition(program, model)
        return drawn.tokens

    @cached_property
    def guide(self) -> ModelSites | None:
        if self.teacher is None:
            return None
        guide = walkable(self.teacher, trust_remote_code=self.trust_remote_code)
        check_teacher(self.found.program, guide.program, self.teacher)
        return guide

    def of(self, sites: Iterable[str]) -> Generator[SiteGradient, None, None]:
        """One walk; UsageError where a site has no gradient or the model cannot be walked."""
        names, tokens = [*sites], self.tokens
        check_reachable(self.found.program, names)
        return site_gradients(
            self.found,
            names,
            tokens,
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
