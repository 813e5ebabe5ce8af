"""Block reconstruction: one layer after another is brought close to what the dense model's layer makes.

Memory holds the weights of one layer, with their gradients where they are trained. Hidden states wait in `States`:
those of the dense model, and those of the model whose layers are changed.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean, median
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spp_fx.adapters.fold import FoldCounts, fold_matrix
from spp_fx.adapters.masked_full import MaskedFull
from spp_fx.adapters.method import FactorSpec, Method, Run, initial_factor
from spp_fx.errors import PatternError
from spp_fx.graph.names import in_model
from spp_fx.graph.program import Program
from spp_fx.graph.rewrite import reach
from spp_fx.pruning.gradients import Source
from spp_fx.pruning.layerwise import Edited, LayerTensors, Tick, silent
from spp_fx.pruning.statistics import Observer, observed
from spp_fx.pruning.update import UPDATES
from spp_fx.pruning.walk import Sample, Samples, Shared, Walk, fitted, on_device

BETAS = (0.9, 0.95)
CLIP = 1.0
"""The largest norm of the gradient of `Block.distance`."""


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are from those of the dense model's: squared, relative to their squared norm.

    Attributes:
        layer: path of its unit.
        before, after: its reconstruction.
        changed: whether it is; one that would come no closer is not.
    """

    layer: str
    before: float
    after: float
    changed: bool


@dataclass(frozen=True)
class Change:
    """What becomes of a layer: the adapter that is folded into each site, and new vectors."""

    sites: dict[str, tuple[Method, dict[str, Tensor]]]
    vectors: dict[str, Tensor] = field(default_factory=dict)


class Reconstruction(Protocol):
    """How the weights of a layer are changed; `passes` is how often it runs the layer on each sample."""

    needs_dense: ClassVar[bool]

    @property
    def passes(self) -> int: ...

    def change(self, block: "Block") -> Change: ...


@dataclass(frozen=True)
class Update:
    """Each matrix by itself gets new values for what its mask keeps, from its inputs and the dense weight.

    Attributes:
        name: of an update, see `UPDATES`.
    """

    needs_dense: ClassVar[bool] = True
    name: str

    @property
    def passes(self) -> int:
        return 1

    @torch.no_grad()
    def change(self, block: "Block") -> Change:
        observer = Observer(
            observed(block.program, block.sites), hessian=True, samples=block.count, device=block.device
        )
        for i in range(block.count):
            block.walk.observe(block.index, block.load(i), block.shared, observer)
            block.progress("inputs")
        found: dict[str, tuple[Method, dict[str, Tensor]]] = {}
        for name in block.sites:
            weight, dense = block.weight(name), _work(block.dense.pop(name))
            delta = torch.zeros_like(weight)
            for expert in _experts(weight):
                seen = observer.inputs.pop((name, 0 if expert is ... else expert), None)
                if seen is not None and seen.tokens:
                    own = weight[expert]
                    try:
                        delta[expert] = UPDATES[self.name](dense[expert], seen, own != 0) - own
                    except PatternError as error:
                        raise PatternError(f"{name}: {error}") from error
            found[name] = MaskedFull(), {"full_delta": delta}
        return Change(found)


@dataclass(frozen=True)
class Training:
    """An adapter of each site is trained until the outputs of the whole layer are close: AdamW, linear decay.

    Attributes:
        method: of every site.
        epochs: over the samples.
        batch: samples of an optimizer step.
        lr: peak learning rate; None: the median of what the method suggests for the sites.
        seed: of the factors' start and the order of samples.
        vectors: norms and biases that are trained as well.
    """

    needs_dense: ClassVar[bool] = False
    method: Method
    epochs: int
    batch: int
    lr: float | None = None
    seed: int = 0
    vectors: frozenset[str] = frozenset()

    @property
    def passes(self) -> int:
        return self.epochs

    @torch.enable_grad()
    def change(self, block: "Block") -> Change:
        weights = {name: block.program.canonical_weight(name).detach() for name in block.sites}
        trained = {name: self._start(name, weight) for name, weight in weights.items()}
        vectors = {
            name: _work(block.program.get_parameter(name)).clone().requires_grad_()
            for name in block.vectors & self.vectors
        }
        parameters = [*(each for own in trained.values() for each in own.values()), *vectors.values()]
        order = torch.Generator().manual_seed(self.seed + block.index)
        batches = [
            batch
            for _ in range(self.epochs)
            for batch in torch.randperm(block.count, generator=order).split(self.batch)
        ]
        lr = self.lr or self._suggested(weights, len(batches))
        # Fused: without temporaries, which would be the most that is ever held.
        optimizer = torch.optim.AdamW(parameters, lr, betas=BETAS, weight_decay=0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
        for batch in batches:
            optimizer.zero_grad()
            for i in batch.tolist():
                now = {name: self._effective(weights[name], own) for name, own in trained.items()}
                loss = block.distance(i, now | vectors) / len(batch)
                if not bool(loss.isfinite()):
                    raise PatternError(
                        f"{block.path}: the distance from the dense layer is {loss.item()}; lower --lr"
                    )
                (loss * block.scale).backward()
                del now, loss
                block.progress("training")
            for each in parameters:
                if each.grad is not None:
                    each.grad /= block.scale
            clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            sites = {
                name: (self.method, self._factors(weights[name], trained.pop(name))) for name in block.sites
            }
        return Change(sites, {name: each.detach() for name, each in vectors.items()})

    def _start(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What is trained for a site: its factors, of one that is as large as the weight what meets a kept weight."""
        made: dict[str, Tensor] = {}
        for key, spec in self.method.factors(tuple(weight.shape)).items():
            factor = initial_factor(spec, f"{name}.{key}", self.seed, weight.device)
            made[key] = (factor[weight != 0] if self._is_full(weight, spec) else factor).requires_grad_()
        return made

    def _factors(self, weight: Tensor, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        specs = self.method.factors(tuple(weight.shape))
        return {
            key: torch.zeros(weight.shape, device=weight.device).masked_scatter(weight != 0, each)
            if self._is_full(weight, specs[key])
            else each
            for key, each in trained.items()
        }

    def _is_full(self, weight: Tensor, spec: FactorSpec) -> bool:
        return self.method.masked_gradient and spec.shape == tuple(weight.shape)

    def _effective(self, weight: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        """In the dtype of the weight: what is wider lives for this weight alone."""
        own = _work(weight)
        change = self.method.update(own, **self._factors(weight, trained))
        return (own + (change if self.method.masked else change * (own != 0))).to(weight.dtype)

    def _suggested(self, weights: Mapping[str, Tensor], steps: int) -> float:
        kept = ((weight.shape[-1], _work(weight[weight != 0])) for weight in weights.values())
        runs = (Run(steps, width, float(own.square().mean().sqrt())) for width, own in kept if own.numel())
        return median([self.method.rate(run) for run in runs] or [1.0])


@torch.no_grad()
def reconstruct_layers(
    model: Source,
    dense: Source,
    samples: Samples,
    sites: Iterable[str],
    how: Reconstruction,
    *,
    dense_inputs: bool = False,
    device: torch.device,
    start: int = 0,
    finish: Callable[[int, Mapping[str, Tensor], LayerError], None],
    tick: Tick = silent,
) -> None:
    """Walk the layers; change each until it makes of its inputs what the dense model has there.

    Zeros stay where they are, and nothing else becomes zero. A layer that would not come closer is left as it was.

    Args:
        model, dense: have one program; the states of layer `start` are there if start is not 0.
        samples: what is walked.
        sites: names, each in one layer; see `outside_of_layers`.
        how: `Update` or `Training`.
        dense_inputs: a layer sees the dense model's hidden states, not those of the layers before it as they are now.
        start: the layer to begin with; their number if all are done.
        finish: called after each layer with its index, its new tensors as they are stored, valid until the next layer,
            and how close it is.

    Raises:
        PatternError: a layer cannot be reconstructed; names it, or the site.
    """
    program, complete = fitted(model.program, samples)
    walk, names = Walk(program, complete, to_end=True), [*sites]
    if start == len(walk.layers):
        return
    count, done = len(complete), 0
    readers = Counter(
        name
        for names in (
            walk.entry_tensors(),
            *map(walk.layer_tensors, range(len(walk.layers))),
            walk.end_tensors(),
        )
        for name in {*map(in_model, names)}
    )
    total = len(walk.layers) * count * (3 + how.passes)

    def progress(path: str, what: str) -> None:
        nonlocal done
        done += 1
        tick(min(start * count * (3 + how.passes) + done, total), total, f"{path}: {what}")

    sides = (dense,) if dense_inputs else (model, dense)
    shared = {
        id(each): _enter(walk, each, complete, device, save=start == 0 and each in sides)
        for each in (model, dense)
    }

    def layer(index: int) -> None:
        path, tensors = walk.layers[index].path, walk.layer_tensors(index)
        own = [name for name in names if program.sites[name].layer in walk.layers[index].units]
        alone = {name for name in tensors if readers[in_model(name)] == 1}
        block = Block(
            walk, index, own, alone, count, model, dense, dense_inputs, shared[id(model)], device, progress
        )
        block.run_dense(shared[id(dense)], keep=how.needs_dense)
        with _in_place(walk, model, tensors, device):
            before = block.compare()
            written = _write(program, model.weights, how.change(block)) if own and before else {}
            after = block.run()
            changed = after < before
            if not changed and written:
                model.weights.fill(program, tensors, device)
                written, after = {}, block.run()
            if index + 1 < len(walk.layers):
                for each in sides:
                    each.states.finish(index + 1)
            finish(index, written, LayerError(path, before, after, changed))
        for each in sides:
            each.states.forget(index)

    for index in range(start, len(walk.layers)):
        layer(index)


class Block:
    """A layer that is about to be changed.

    Attributes:
        sites: those of it, in the order of the model.
        alone: names of its tensors that nothing else reads.
        count: samples.
        dense: the dense model's weights of the sites, canonical, where they were kept.
        shared: what all samples share.
    """

    def __init__(
        self,
        walk: Walk,
        index: int,
        sites: Sequence[str],
        alone: set[str],
        count: int,
        model: Source,
        dense: Source,
        dense_inputs: bool,
        shared: Shared,
        device: torch.device,
        progress: Callable[[str, str], None],
    ) -> None:
        self.walk, self.index, self.sites, self.alone, self.count = walk, index, sites, alone, count
        self.shared, self.device, self.dense = shared, device, dict[str, Tensor]()
        self._model, self._teacher, self._dense_inputs, self._progress = model, dense, dense_inputs, progress
        layer = walk.layers[index]
        after = walk.layers[index + 1].reads if index + 1 < len(walk.layers) else walk.end
        calls = [
            node
            for node in layer.nodes
            if node.op == "call_module" and in_model(str(node.target)) in layer.units
        ]
        made = {*reach(calls, lambda node: node.users)}
        self._made = [at for at, node in enumerate(after) if node in made]
        self._energy: dict[int, float] = {}

    @property
    def program(self) -> Program:
        return self.walk.program

    @property
    def path(self) -> str:
        return self.walk.layers[self.index].path

    @property
    def vectors(self) -> set[str]:
        """The one-dimensional parameters that the layer alone reads, under one name."""
        own = dict(self.program.named_parameters())
        return {
            name
            for name in self.alone
            if name in own and own[name].ndim == 1 and len(self.program.names_of(name)) == 1
        }

    @property
    def scale(self) -> float:
        """What makes of a distance a sum of squares: gradients of the relative one are too small for float16."""
        return max(self._energy.values(), default=1.0) / self.count

    def progress(self, what: str) -> None:
        """One sample went through the layer."""
        self._progress(self.path, what)

    def weight(self, site: str) -> Tensor:
        """The canonical weight of a site, in float32 or more."""
        return _work(self.program.canonical_weight(site))

    def load(self, sample: int) -> list[Any]:
        """What the layer reads of a sample."""
        source = self._teacher if self._dense_inputs else self._model
        return self._on_device(source.states.load(self.index, sample))

    def run_dense(self, shared: Shared, *, keep: bool) -> None:
        """Save what the dense model's layer makes; with `keep`, also the weights of sites."""
        with _in_place(self.walk, self._teacher, self.walk.layer_tensors(self.index), self.device):
            for i in range(self.count):
                values = self._on_device(self._teacher.states.load(self.index, i))
                made = self.walk.run(self.index, values, shared)
                self._teacher.states.save(self.index + 1, i, made)
                for at in self._made:
                    if isinstance(made[at], Tensor) and made[at].is_floating_point():
                        energy = float(made[at].double().square().sum())
                        self._energy[at] = self._energy.get(at, 0.0) + energy
                self.progress("dense")
            self._energy = {at: energy for at, energy in self._energy.items() if energy}
            if keep:
                self.dense = {n: self.program.canonical_weight(n).detach().clone() for n in self.sites}

    def distance(self, sample: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """The squared distance of a sample's outputs from the dense model's; the mean would be 1 for outputs of 0.

        Args:
            tensors: that stand for weights of sites, canonical, and for other parameters.
        """
        with _instead(self.program, self.walk.layer_tensors(self.index), self._as_stored(tensors)):
            made = self.walk.run(self.index, self.load(sample), self.shared)
        return torch.stack([*self._distances(sample, made).values()]).mean()

    @torch.no_grad()
    def compare(self) -> float:
        """The mean distance as the layer is; from now on outputs that are the dense model's do not count.

        Raises:
            PatternError: an output is NaN or infinite.
        """
        sums = dict.fromkeys(self._energy, 0.0)
        for i in range(self.count):
            made = self.walk.run(self.index, self.load(i), self.shared)
            for at, distance in self._distances(i, made).items():
                sums[at] += float(distance) / self.count
            self.progress("before")
        if not all(isfinite(each) for each in (*sums.values(), *self._energy.values())):
            raise PatternError(f"{self.path}: its outputs, or those of the dense layer, are NaN or infinite")
        self._energy = {at: self._energy[at] for at, each in sums.items() if each}
        return fmean([each for each in sums.values() if each] or [0.0])

    @torch.no_grad()
    def run(self) -> float:
        """The mean distance; what the layer makes is what the next one reads."""
        found = [0.0]
        for i in range(self.count):
            made = self.walk.run(self.index, self.load(i), self.shared)
            found += [float(each) / self.count for each in self._distances(i, made).values()]
            if self.index + 1 < len(self.walk.layers) and not self._dense_inputs:
                self._model.states.save(self.index + 1, i, made)
            self.progress("outputs")
        return sum(found) / max(1, len(self._energy))

    def _distances(self, sample: int, made: Sequence[Any]) -> dict[int, Tensor]:
        """By output, relative to the mean squared norm of the dense model's."""
        wanted = self._on_device(self._teacher.states.load(self.index + 1, sample))
        return {
            at: (made[at].float() - wanted[at].float()).square().sum() * (self.count / energy)
            for at, energy in self._energy.items()
        }

    def _as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sites = self.program.sites
        turned = {
            name: each.transpose(-1, -2) if name in sites and sites[name].transposed else each
            for name, each in tensors.items()
        }
        return {name: each.to(self.program.get_parameter(name).dtype) for name, each in turned.items()}

    def _on_device(self, values: Sequence[Any]) -> list[Any]:
        return [each.to(self.device) if isinstance(each, Tensor) else each for each in values]


def _enter(
    walk: Walk, source: Source, samples: Sequence[Sample], device: torch.device, *, save: bool
) -> Shared:
    """Save what the first layer reads of each sample; what all samples share."""
    shared: Shared = {}
    with _in_place(walk, source, walk.entry_tensors(), device):
        for i, sample in enumerate(samples if save else samples[:1]):
            values, shared = walk.enter(on_device(sample, device))
            if save:
                source.states.save(0, i, values)
    if save:
        source.states.finish(0)
    return shared


def _write(program: Program, weights: LayerTensors, change: Change) -> dict[str, Tensor]:
    """Fold adapters into the sites of a layer and replace its vectors; the tensors as they are stored."""
    edited = Edited(program, weights)
    for name, (method, factors) in change.sites.items():
        weight = edited.canonical(name)
        for expert in _experts(weight):
            own, row = weight[expert], 0
            parts = {key: value[expert] for key, value in factors.items()}
            for block in fold_matrix(method, own, parts, "keep", FoldCounts(), name):
                own[row : row + len(block)] = block
                row += len(block)
    for name, vector in change.vectors.items():
        edited.stored(name).copy_(vector)
    edited.put_back()
    return edited.tensors


@contextmanager
def _in_place(
    walk: Walk, source: Source, names: list[str], device: torch.device
) -> Generator[None, None, None]:
    """Parameters and buffers have a model's values within the block."""
    source.weights.fill(walk.program, names, device)
    try:
        yield
    finally:
        source.weights.empty(walk.program, names)


@contextmanager
def _instead(
    program: Program, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> Generator[None, None, None]:
    """Let other tensors stand for parameters, under each name of `names` that a parameter has."""
    others = {id(program.get_parameter(name)): tensor for name, tensor in tensors.items()}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        table = program.get_submodule(path)._parameters
        if (other := others.get(id(table.get(attribute)))) is not None:
            before.append((table, attribute, table[attribute]))
            table[attribute] = other  # pyright: ignore[reportArgumentType] - autograd goes through what is no parameter
    try:
        yield
    finally:
        for table, attribute, parameter in before:
            table[attribute] = parameter


def _experts(weight: Tensor) -> Sequence[Any]:
    """The indices of the matrices of a weight: of each expert, or of the whole."""
    return range(weight.shape[0]) if weight.ndim == 3 else [...]


def _work(weight: Tensor) -> Tensor:
    """In the dtype that is computed in, without a gradient."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
