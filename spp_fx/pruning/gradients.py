"""Gradients of the loss with respect to the weights of one layer after another, in the memory of one layer."""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from spp_fx.errors import PatternError, UsageError
from spp_fx.graph.program import Program
from spp_fx.graph.task import CAUSAL_LM
from spp_fx.pruning.layerwise import LayerTensors, Tick, outside_of_layers, silent
from spp_fx.pruning.walk import Sample, Samples, Shared, States, Walk, fitted, on_device


@dataclass(frozen=True)
class SiteGradient:
    """The weight of one site and the gradient of the mean loss with respect to it, in the same orientation.

    Attributes:
        site: its name.
        weight: (out, in) or (experts, out, in), in the dtype that the program computes in.
        grad: the same shape, float32; dense: it is not zero where the weight is.
    """

    site: str
    weight: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Source:
    """A model that is walked: its program, and where the program's tensors and the values between layers are.

    Attributes:
        program: partitioned, in eval mode, without adapters.
        weights: where its tensors come from.
        states: what every layer reads of every sample is kept here, so `FileStates` for a large model.
    """

    program: Program
    weights: LayerTensors
    states: States

    def at(self, samples: Samples) -> tuple["Source", list[Sample]]:
        """With a program that holds for each of some samples, and these with all inputs; see `fitted`."""
        program, complete = fitted(self.program, samples)
        return replace(self, program=program), complete


def without_gradient(program: Program, sites: Iterable[str]) -> dict[str, str]:
    """The sites whose gradients `layer_gradients` does not give, with reasons."""
    sites = tuple(sites)
    reasons = {
        name: "is outside the layers, where no gradient is taken"
        if program.sites[name].layer not in program.units
        else "is used outside its layer as well, where no gradient is taken"
        for name in outside_of_layers(program, sites)
    }
    tied = {name: other for name in sites for other in program.names_of(name) if other != name}
    return {name: f"shares its weight with {other}" for name, other in tied.items()} | reasons


def layer_gradients(
    source: Source,
    samples: Samples,
    sites: Collection[str],
    *,
    device: torch.device,
    teacher: Source | None = None,
    tick: Tick = silent,
) -> Generator[SiteGradient, None, None]:
    """Walk forward through the layers and back, and give each layer's gradients before going to the one before it.

    The loss of a text is the mean over all predicted tokens of all samples: the cross entropy of the text, or the
    divergence KL(teacher || student) from a teacher's predictions. Of other tasks it is the mean over samples of the
    task's loss of each, whose labels it has, or of the task's distance from a teacher. Memory holds the weights of one
    layer with their gradients, and the activations of one layer for one sample; `states` holds the inputs of every
    layer for every sample, each until the layer is done. An expert that received no token has a gradient of zeros.

        for each in layer_gradients(Source(program, FolderWeights(found), FileStates(folder)), samples, sites, ...):
            saliency[each.site] = (each.weight * each.grad).norm()

    Layers come in descending order. What is given is valid until the next one is asked for.

    Args:
        source: the model.
        samples: texts of one length, at least 2; of other tasks, samples, with labels where there is no teacher.
        sites: names of sites, none of them in `without_gradient`.
        device: where layers run.
        teacher: a model with the same outputs, such as logits of the same vocabulary, walked before.

    Raises:
        UsageError: samples have no labels, and there is no teacher.
        PatternError: the loss or a gradient is not finite; names the site.
    """
    walk = SampleWalk.of(source, samples, device, to_end=True)
    source = walk.source
    task = source.program.task.name
    if teacher is None and task != CAUSAL_LM and any("labels" not in sample for sample in walk.samples):
        raise UsageError(f"gradients of a loss need labels: give data of {task} that has them, or a teacher")
    guide = None if teacher is None else SampleWalk.of(teacher, samples, device, to_end=True)
    passes, done = 2 * len(walk.walk.layers) + 1 + (0 if guide is None else len(guide.walk.layers)), 0

    def progress(what: str) -> None:
        nonlocal done
        done += 1
        tick(done, passes * len(walk.samples), what)

    guide_shared = None if guide is None else guide.forward(progress, keep=False)
    shared = walk.forward(progress, keep=True)
    with walk.in_place(walk.walk.end_tensors()):
        if guide is None or guide_shared is None:
            walk.loss(shared, None, progress)
        else:
            with guide.in_place(guide.walk.end_tensors()):
                walk.loss(shared, lambda sample: guide.outputs(sample, guide_shared), progress)
            guide.source.states.forget(len(guide.walk.layers))
    for index in reversed(range(len(walk.walk.layers))):
        own = [name for name in sites if source.program.sites[name].layer in walk.walk.layers[index].units]
        with walk.in_place(walk.walk.layer_tensors(index)):
            grads = walk.backward(index, own, shared, progress)
            for name in own:
                transposed, grad = source.program.sites[name].transposed, grads.pop(name)
                weight = source.program.canonical_weight(name).detach()
                yield SiteGradient(name, weight, grad.transpose(-1, -2) if transposed else grad)
    source.states.forget(0)


@dataclass(frozen=True)
class SampleWalk:
    """One model and the samples that go through it; each call leaves none of its weights behind."""

    walk: Walk
    source: Source
    samples: Sequence[Sample]
    device: torch.device

    @classmethod
    def of(
        cls, source: Source, samples: Samples, device: torch.device, *, to_end: bool = False
    ) -> "SampleWalk":
        fits, complete = source.at(samples)
        return cls(Walk(fits.program, complete, to_end=to_end), fits, complete, device)

    @torch.no_grad()
    def enter(self) -> Shared:
        """Save what the first layer reads; what all samples share."""
        shared: Shared = {}
        with self.in_place(self.walk.entry_tensors()):
            for i, sample in enumerate(self.samples):
                values, shared = self.walk.enter(on_device(sample, self.device))
                self.source.states.save(0, i, values)
        return shared

    @torch.no_grad()
    def forward(self, progress: Callable[[str], None], *, keep: bool) -> Shared:
        """Save what every layer reads, and the end; without `keep` only the end stays. What all samples share."""
        shared, states = self.enter(), self.source.states
        for index, layer in enumerate(self.walk.layers):
            with self.in_place(self.walk.layer_tensors(index)):
                for i in range(len(self.samples)):
                    states.save(index + 1, i, self.walk.run(index, self.load(index, i), shared))
                    progress(f"{layer.path}: {'forward' if keep else 'teacher'}")
            if not keep:
                states.forget(index)
        return shared

    @torch.no_grad()
    def outputs(self, sample: int, shared: Shared) -> dict[str, Tensor]:
        """Those of a sample by name, from the end's values."""
        return self.walk.leave(self.load(len(self.walk.layers), sample), shared)

    @torch.enable_grad()
    def loss(
        self,
        shared: Shared,
        target: Callable[[int], Mapping[str, Tensor]] | None,
        progress: Callable[[str], None],
    ) -> None:
        """Replace the end's values by the gradients of the loss of each sample: of a text, the sum over predictions.

        The mean over all samples would be too small a number for the gradients of float16.
        """
        end = len(self.walk.layers)
        for i in range(len(self.samples)):
            leaves = _leaves(self.load(end, i))
            outputs = self.walk.leave(_copies(leaves), shared)
            sample = on_device(self.samples[i], self.device)
            if self._is_text:
                logits = outputs["logits"][0, :-1].float()
                if target is None:
                    loss = cross_entropy(logits, sample["input_ids"][0, 1:], reduction="sum")
                else:
                    wanted = log_softmax(target(i)["logits"][0, :-1].float(), -1)
                    loss = (wanted.exp() * (wanted - log_softmax(logits, -1))).sum()
            elif target is None:
                loss = self.source.program.task.loss(self.source.program, outputs, sample["labels"])
            else:
                loss = self.source.program.task.distance(outputs, target(i), sample)
            if not bool(loss.isfinite()):
                raise PatternError(f"the loss of calibration sample {i + 1} is {loss.item()}")
            self.source.states.save(end, i, _gradients([loss], [torch.ones_like(loss)], leaves))
            progress("loss: backward")

    @torch.enable_grad()
    def backward(
        self, index: int, sites: Sequence[str], shared: Shared, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        """Gradients of the sites of a layer, as they are stored; the layer's values become their gradients."""
        program, states, path = self.source.program, self.source.states, self.walk.layers[index].path
        weights = {name: program.get_parameter(name) for name in sites}
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        required = {name: weight.requires_grad for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for i in range(len(self.samples)):
                values = self.load(index, i)
                leaves = _leaves(values) if index else values
                outputs = self.walk.run(index, _copies(leaves), shared)
                known = self.load(index + 1, i)
                found = _gradients(outputs, known, [*leaves, *weights.values()])
                for name, grad in zip(weights, found[len(leaves) :], strict=True):
                    if grad is not None:
                        sums[name] += grad
                if index > 0:
                    states.save(index, i, found[: len(leaves)])
                progress(f"{path}: backward")
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(required[name])
        states.forget(index + 1)
        predictions = sum(sample["input_ids"].shape[1] - 1 if self._is_text else 1 for sample in self.samples)
        for name, total in sums.items():
            if not bool(total.div_(predictions).isfinite().all()):
                raise PatternError(f"{name}: its gradient on the calibration text is NaN or infinite")
        return sums

    @contextmanager
    def in_place(self, names: list[str]) -> Generator[None, None, None]:
        """Parameters and buffers have their values within the block."""
        self.source.weights.fill(self.source.program, names, self.device)
        try:
            yield
        finally:
            self.source.weights.empty(self.source.program, names)

    @property
    def _is_text(self) -> bool:
        return self.source.program.task.name == CAUSAL_LM

    def load(self, index: int, sample: int) -> list[Any]:
        """What a layer reads of a sample."""
        values = self.source.states.load(index, sample)
        return [value.to(self.device) if isinstance(value, Tensor) else value for value in values]


def _leaves(values: Sequence[Any]) -> list[Any]:
    """The values, floating tensors as leaves of a new autograd graph."""
    return [
        value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in values
    ]


def _copies(leaves: Sequence[Any]) -> list[Any]:
    """The same values for a graph, which may write to what it is given: autograd allows that for copies of leaves."""
    return [value.clone() if isinstance(value, Tensor) else value for value in leaves]


def _gradients(outputs: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor | None]:
    """The gradient of each input that can have one, given those of outputs; None for the others."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if isinstance(output, Tensor) and output.requires_grad and isinstance(grad, Tensor)
    ]
    at = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
    result: list[Tensor | None] = [None] * len(inputs)
    if pairs and at:
        made, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(made, [inputs[i] for i in at], given, allow_unused=True)
        for i, grad in zip(at, found, strict=True):
            result[i] = grad
    return result
