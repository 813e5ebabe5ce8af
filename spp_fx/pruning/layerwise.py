"""Pruning layer by layer, each calibrated on the outputs of the pruned layers before it."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from spp_fx.errors import PreconditionError
from spp_fx.graph.flow import Flow
from spp_fx.graph.names import in_model
from spp_fx.graph.program import Program
from spp_fx.pruning.criterion import Criterion
from spp_fx.pruning.permute import Producers, best_order, producers
from spp_fx.pruning.recipe import MatrixReport, Recipe, prune_matrix
from spp_fx.pruning.statistics import InputsBySite, Observer, observed
from spp_fx.pruning.walk import Layer, Sample, Samples, Shared, States, Walk, fitted, on_device
from spp_fx.sparsity.pattern import NM, Pattern

Tick = Callable[[int, int, str], None]
"""Called with the passes of a sample through a layer that are done, how many there are, and the layer."""


def silent(done: int, total: int, item: str) -> None:
    """Show nothing."""


Part = tuple[int | None, int, int]
"""An expert, if the site is a stack, and rows from start to stop."""


class LayerTensors(Protocol):
    """Where the tensors of a program come from when a layer is about to run."""

    def fill(self, program: Program, names: Iterable[str], device: torch.device) -> None:
        """Give these parameters and buffers their values."""
        ...

    def empty(self, program: Program, names: Iterable[str]) -> None:
        """Free them again."""
        ...

    def stored(self, program: Program, name: str) -> Tensor:
        """A parameter as it is stored, to be pruned in place: the program's own, unless dtypes differ."""
        ...

    def parts(self, program: Program, site: str) -> list[Part]:
        """The matrices that are pruned each by itself: those that are stored as one."""
        ...


class InPlace:
    """The tensors that the program itself holds."""

    def fill(self, program: Program, names: Iterable[str], device: torch.device) -> None:
        pass

    def empty(self, program: Program, names: Iterable[str]) -> None:
        pass

    def stored(self, program: Program, name: str) -> Tensor:
        return program.get_parameter(name).data

    def parts(self, program: Program, site: str) -> list[Part]:
        shape = program.sites[site].shape
        return [(e, 0, shape[-2]) for e in range(shape[0])] if len(shape) == 3 else [(None, 0, shape[-2])]


@dataclass(frozen=True)
class LayerResult:
    """What was done to one layer.

    Attributes:
        layer: path of its unit.
        tensors: new values by parameter, as stored; valid until the next layer.
        reports: of every matrix.
    """

    layer: str
    tensors: Mapping[str, Tensor]
    reports: tuple[MatrixReport, ...]


def outside_of_layers(program: Program, sites: Iterable[str]) -> dict[str, str]:
    """The sites that a walk over the layers does not calibrate, with reasons."""
    reasons: dict[str, str] = {}
    uses = program.uses()
    for name in sites:
        layer = program.sites[name].layer
        if layer not in program.units:
            reasons[name] = (
                "is outside the layers, where nothing is calibrated; prune it with --method magnitude"
            )
        elif any(not f"{in_model(use.path)}.".startswith(f"{layer}.") for use in uses.get(name, [])):
            reasons[name] = "is used outside its layer as well, where nothing is calibrated"
    return reasons


@torch.no_grad()
def prune_layers(
    program: Program,
    samples: Samples,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    *,
    weights: LayerTensors,
    states: States,
    device: torch.device,
    start: int = 0,
    finish: Callable[[int, LayerResult], None],
    tick: Tick = silent,
) -> None:
    """Walk the layers: run one to see its inputs, prune it, run it again to feed the next.

    Args:
        program: partitioned, in eval mode.
        samples: what it is calibrated on.
        patterns: by site; all of them lie in layers.
        recipe: how a matrix is pruned.
        weights: where the tensors come from.
        states: where values wait between layers; those of layer `start` are there if start is not 0.
        start: the layer to begin with; their number if all are done.
        finish: called after each layer with its index and what was done, while it is still in place.

    Raises:
        PatternError: names the site that cannot be pruned, and why.
    """
    program, complete = fitted(program, samples)
    run = _Run(Walk(program, complete), len(complete), patterns, recipe, weights, states, device, tick)
    if start == len(run.walk.layers):
        return
    shared = run.enter(complete, start)
    for index in range(start, len(run.walk.layers)):
        run.layer(index, shared, finish)


@dataclass(frozen=True)
class _Run:
    """One walk over the layers; each call leaves none of a layer's weights behind."""

    walk: Walk
    samples: int
    patterns: Mapping[str, Pattern]
    recipe: Recipe
    weights: LayerTensors
    states: States
    device: torch.device
    tick: Tick

    @cached_property
    def flow(self) -> Flow:
        return Flow(self.walk.program)

    def enter(self, samples: Sequence[Sample], start: int) -> Shared:
        """Save what the first layer reads, if that is where the walk begins; what all samples share."""
        shared: Shared = {}
        with self._in_place(self.walk.entry_tensors()):
            for i in range(self.samples if start == 0 else 1):
                values, shared = self.walk.enter(on_device(samples[i], self.device))
                if start == 0:
                    self.states.save(0, i, values)
                    self._progress(0, 0, "embeddings")
        if start == 0:
            self.states.finish(0)
        return shared

    def layer(self, index: int, shared: Shared, finish: Callable[[int, LayerResult], None]) -> None:
        """See the inputs of a layer, prune it, and save what it gives the next."""
        layer, last = self.walk.layers[index], len(self.walk.layers) - 1
        sites = self.walk.program.sites
        patterns = {n: pattern for n, pattern in self.patterns.items() if sites[n].layer in layer.units}
        with self._in_place(self.walk.layer_tensors(index)):
            result = self._prune(layer, patterns, self._observe(index, shared, patterns))
            for i in range(self.samples if index < last else 0):
                self.states.save(index + 1, i, self.walk.run(index, self._load(index, i), shared))
                self._progress(index, self.samples + i + 1, "outputs")
            if index < last:
                self.states.finish(index + 1)
            finish(index, result)

    def _observe(self, index: int, shared: Shared, sites: Iterable[str]) -> InputsBySite:
        program, hessian = self.walk.program, self.recipe.hessian
        observer = Observer(
            observed(program, sites),
            hessian=hessian,
            samples=self.samples,
            device=self.device,
        )
        for i in range(self.samples):
            self.walk.observe(index, self._load(index, i), shared, observer)
            self._progress(index, i + 1, "inputs")
        return observer.inputs

    def _prune(self, layer: Layer, patterns: Mapping[str, Pattern], seen: InputsBySite) -> LayerResult:
        edited = Edited(self.walk.program, self.weights)
        notes: dict[str, str] = {}
        if self.recipe.criterion.reorders:
            notes = _reorder(self.flow, layer, self.recipe.criterion, patterns, seen, edited)
        reports: list[MatrixReport] = []
        for name, pattern in patterns.items():
            canonical, parts = edited.canonical(name), self.weights.parts(self.walk.program, name)
            for expert, start, stop in parts:
                inputs = seen.get((name, expert or 0))
                if inputs is None:
                    raise PreconditionError(f"{name}: its layer ran without using it")
                matrix = (canonical if expert is None else canonical[expert])[start:stop]
                report = prune_matrix(matrix, inputs, pattern, self.recipe, name, expert)
                own = (*report.notes, notes[name]) if name in notes else report.notes
                reports.append(replace(report, start=start, notes=own))
            for expert, *_ in parts:
                seen.pop((name, expert or 0), None)  # products of inputs are large
        edited.put_back()
        return LayerResult(layer.path, edited.tensors, tuple(reports))

    def _load(self, index: int, sample: int) -> list[object]:
        values = self.states.load(index, sample)
        return [value.to(self.device) if isinstance(value, Tensor) else value for value in values]

    def _progress(self, index: int, done: int, what: str) -> None:
        total = 2 * self.samples * len(self.walk.layers) - self.samples
        self.tick(2 * self.samples * index + done, total, f"{self.walk.layers[index].path}: {what}")

    @contextmanager
    def _in_place(self, names: list[str]) -> Generator[None, None, None]:
        self.weights.fill(self.walk.program, names, self.device)
        try:
            yield
        finally:
            self.weights.empty(self.walk.program, names)


class Edited:
    """Parameters of a layer as they are stored, changed in place."""

    def __init__(self, program: Program, weights: LayerTensors) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._program = program
        self._weights = weights

    def stored(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self._weights.stored(self._program, name)
        return self.tensors[name]

    def canonical(self, site: str) -> Tensor:
        """The weight of a site as (..., out, in)."""
        stored = self.stored(site)
        return stored.transpose(-1, -2) if self._program.sites[site].transposed else stored

    def put_back(self) -> None:
        """Copy them into the program."""
        for name, tensor in self.tensors.items():
            parameter = self._program.get_parameter(name).data
            if parameter.data_ptr() != tensor.data_ptr():
                parameter.copy_(tensor)


def _reorder(
    flow: Flow,
    layer: Layer,
    criterion: Criterion,
    patterns: Mapping[str, Pattern],
    seen: InputsBySite,
    edited: Edited,
) -> dict[str, str]:
    """Give sites whose inputs can change places the order that keeps most; what was done or why not, by site."""
    notes: dict[str, str] = {}
    possible: dict[str, Producers | str] = {}
    for unit in layer.units:
        possible |= producers(flow, unit)
    shared = {*flow.program.tied, *flow.program.tied.values()}
    for name, pattern in patterns.items():
        makers = possible.get(name, "its layer runs without it")
        if not shared.isdisjoint((name, *(() if isinstance(makers, str) else makers.sites))):
            makers = "is shared with another layer, or is made by a weight that is"
        if not isinstance(pattern, NM):
            notes[name] = f"inputs keep their order: {pattern} has no groups"
        elif isinstance(makers, str):
            notes[name] = f"inputs keep their order: {makers}"
        else:
            weight, inputs = edited.canonical(name), seen[name, 0]
            order = best_order(criterion.score(weight, inputs), pattern)
            if order is None:
                notes[name] = "inputs keep their order: another keeps no more"
                continue
            weight.copy_(weight[:, order])
            inputs.reorder(order)
            for tensor in (*map(edited.canonical, makers.sites), *map(edited.stored, makers.biases)):
                tensor.copy_(tensor[order])
            notes[name] = f"inputs reordered, and with them the rows of {', '.join(makers.sites)}"
    return notes


def replace_tensor(program: Program, name: str, tensor: Tensor) -> None:
    """Put another tensor under the name of a parameter or buffer."""
    path, _, attribute = name.rpartition(".")
    module = program.get_submodule(path)
    if attribute in module._parameters:
        is_one = isinstance(tensor, nn.Parameter)
        module._parameters[attribute] = tensor if is_one else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor
