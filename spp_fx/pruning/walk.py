"""Running a program one layer at a time over many samples, and where their values wait between layers.

The graph says what each layer needs: the values that later layers read are all that has to be kept between
two of them. Those that depend on the sample (hidden states) are kept for each; the others (positions, masks)
are functions of sizes, and made once where all samples have the same.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx

from spp_fx.errors import FormatError, PreconditionError, UsageError
from spp_fx.graph.leaves import run_leaf
from spp_fx.graph.names import in_model
from spp_fx.graph.program import SITE, Program
from spp_fx.graph.rewrite import flatten, reach
from spp_fx.graph.sizes import sizes_in
from spp_fx.graph.task import Input
from spp_fx.storage.output import fsync_file, fsync_folder

SIZE = torch.ops.aten.sym_size.int

Sample = Mapping[str, Tensor]
"""The inputs of one row by name, each (1, ...), and perhaps its `labels`."""
Samples = Tensor | Sequence[Sample]
"""Samples, or the token ids (samples, length) int64 of as many."""
Observe = Callable[[fx.Node, tuple[Any, ...]], None]
"""Called with each node that contracts a site, or is a leaf, and its arguments, before it runs."""
Shared = dict[str, Any]
"""Values by the names of their nodes: those that are the same for every sample."""


def fitted(program: Program, samples: Samples) -> tuple[Program, list[Sample]]:
    """The trace of a program that holds for every one of some samples, and the samples with all inputs.

    Raises:
        UsageError: there are none, one is not a row of the task, or the model's code branches on sizes that they differ
            in.
    """
    if isinstance(samples, Tensor):
        samples = [{"input_ids": row[None]} for row in samples]
    if not samples:
        raise UsageError("there are no calibration samples")
    complete: list[Sample] = []
    sizes: dict[tuple[int, ...], dict[str, int]] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    for sample in samples:
        rest: dict[str, Any] = dict(sample)
        given = program.take((), rest)
        complete.append(given | {"labels": rest["labels"]} if "labels" in rest else given)
        found = sizes_in(program.inputs, given)
        sizes[tuple(found.values())] = found
        counts[tuple(found.values())] += 1
    # Each trace takes seconds: that of the largest sizes, or of the most frequent ones, holds for all, or none does.
    for key in dict.fromkeys((max(sizes), counts.most_common(1)[0][0])):
        trace = program.at(**sizes[key])
        if all(trace.sizes.admit(**other) for other in sizes.values()):
            return trace, complete
    raise UsageError(
        "the model's code branches on the sizes of calibration samples, so all of them must have the same; use samples "
        "of one length"
    )


def on_device(sample: Sample, device: torch.device) -> Sample:
    """A sample on the device where layers run."""
    return {name: each.to(device) for name, each in sample.items()}


class States(Protocol):
    """The values that each layer reads of each sample."""

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        """Keep what a layer will read; samples come in order."""
        ...

    def load(self, layer: int, sample: int) -> list[Any]:
        """What a layer reads, in memory of its own."""
        ...

    def finish(self, layer: int) -> None:
        """All samples of this layer were saved, and nothing before it is read any more."""
        ...

    def forget(self, layer: int) -> None:
        """Remove what a layer read."""
        ...


class MemoryStates:
    """States in memory."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], list[Any]] = {}

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        self._values[layer, sample] = [_copy(value) for value in values]

    def load(self, layer: int, sample: int) -> list[Any]:
        return [_copy(value) for value in self._values[layer, sample]]

    def finish(self, layer: int) -> None:
        for before in range(layer):
            self.forget(before)

    def forget(self, layer: int) -> None:
        for key in [key for key in self._values if key[0] == layer]:
            del self._values[key]


class FileStates:
    """States in a safetensors file per layer and sample, which a process that is killed leaves whole.

    Values that are not tensors, such as sizes, are JSON in the file's metadata.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        tensors: dict[str, Tensor] = {}
        others: dict[str, str] = {}
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                tensors[str(index)] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            elif isinstance(value, bool | int | float) or value is None:
                others[str(index)] = json.dumps(value)
            else:
                kind = type(value).__name__
                raise PreconditionError(f"a layer reads a {kind}, which cannot be kept between layers")
        self._of_layer(layer).mkdir(exist_ok=True)
        # Not save_file: a full disk would not be an OSError.
        self._file(layer, sample).write_bytes(save(tensors, others))

    def load(self, layer: int, sample: int) -> list[Any]:
        path = self._file(layer, sample)
        try:
            with safe_open(path, framework="pt") as file:
                values = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
                others = file.metadata() or {}
        except SafetensorError as error:
            raise FormatError(f"{path}: is damaged ({error}); start over with --fresh") from error
        values |= {name: json.loads(text) for name, text in others.items()}
        return [values[str(index)] for index in range(len(values))]

    def finish(self, layer: int) -> None:
        for path in self._of_layer(layer).iterdir():
            fsync_file(path)
        fsync_folder(self._of_layer(layer))
        fsync_folder(self._folder)

    def forget(self, layer: int) -> None:
        """Remove what a layer read."""
        shutil.rmtree(self._of_layer(layer), ignore_errors=True)

    def _of_layer(self, layer: int) -> Path:
        return self._folder / f"states-{layer:05d}"

    def _file(self, layer: int, sample: int) -> Path:
        return self._of_layer(layer) / f"{sample:05d}.safetensors"


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


class Interpreter(fx.Interpreter):
    """Runs a graph node by node, graphs that it calls as well, and shows the nodes that contract sites."""

    def __init__(self, module: fx.GraphModule, observe: Observe | None = None) -> None:
        super().__init__(module)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            child = self.fetch_attr(str(n.target))
            if isinstance(child, fx.GraphModule):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return Interpreter(child, self.observe).run(*args, *kwargs.values())
        if self.observe is not None and (SITE in n.meta or n.target is run_leaf):
            self.observe(n, self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)


@dataclass(frozen=True)
class Layer:
    """A layer, or several that are walked as one: those between two calls of a layer, or that share a weight.

    Attributes:
        units: paths of its units.
        nodes: from the node that calls it to those that run before the next one is called, after the parameters and
            buffers that they read.
        calls: how many of `nodes` it takes to the end of its last call.
        reads: values from before it, that it or a later layer reads, and that depend on the sample.
    """

    units: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    calls: int
    reads: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        """What it is called in messages."""
        return self.units[0] if len(self.units) == 1 else f"{self.units[0]} to {self.units[-1]}"


class Walk:
    """The layers of a partitioned program in the order in which they run.

    The graphs that call layers are made one graph, so layers may belong to several: of an encoder and a decoder, of a
    vision tower and a language model.

    Args:
        samples: what will be walked, complete (see `fitted`): where they differ decides which values they share. By
            default texts of one length.

    Attributes:
        end: values from before the end of the last layer that depend on the sample and are read after it; only
            where the walk goes `to_end`, which keeps them from layer to layer.

    Raises:
        PreconditionError: the program has no units, or they are checkpointed.
    """

    def __init__(self, program: Program, samples: Sequence[Sample] = (), *, to_end: bool = False) -> None:
        if not program.units:
            raise PreconditionError("calibration walks layer by layer: run partition first")
        self.program = program
        nodes = list(flatten(program.root, lambda path: _calls_units(program, path)).nodes)
        calls = [
            (at, in_model(str(node.target)))
            for at, node in enumerate(nodes)
            if node.op == "call_module" and in_model(str(node.target)) in program.units
        ]
        if missing := {*program.units} - {unit for _, unit in calls}:
            raise PreconditionError(
                f"calibration needs layers that are not checkpointed, such as {min(missing)}"
            )
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        groups = _groups(program, calls)
        begins, end = [first for first, *_ in groups], groups[-1][1] + 1
        last = len(nodes) if to_end else end
        later = set(nodes[begins[0] : last])
        self._prefix = _segment(nodes, 0, begins[0])
        self._suffix = _segment(nodes, end, len(nodes))
        own = self._varying(samples)
        self._shared = {
            node
            for node in self._prefix
            if node not in own and node.op != "get_attr" and not later.isdisjoint(node.users)
        }
        self.layers = tuple(
            Layer(
                units,
                segment := _segment(nodes, start, stop),
                len(segment) - (stop - 1 - final),
                self._reads(nodes, start, last),
            )
            for (start, final, units), stop in zip(groups, [*begins[1:], end], strict=True)
        )
        self.end = self._reads(nodes, end, last)

    def enter(self, sample: Sample) -> tuple[list[Any], Shared]:
        """What the first layer reads of a sample, and what all samples share.

        Args:
            sample: complete, see `fitted`.
        """
        interpreter = Interpreter(self.program.root)
        given = (sample[entry.name] for entry in self.program.inputs)
        interpreter.env = dict(zip(self._inputs, given, strict=True))
        _run(interpreter, self._prefix)
        values = [interpreter.env[node] for node in self.layers[0].reads]
        return values, {node.name: interpreter.env[node] for node in self._shared}

    def observe(self, index: int, values: Sequence[Any], shared: Shared, observe: Observe) -> None:
        """Run one layer on what it reads, showing the nodes that contract sites."""
        layer = self.layers[index]
        _run(self._with(layer.reads, values, shared, observe), layer.nodes[: layer.calls])

    def run(self, index: int, values: Sequence[Any], shared: Shared) -> list[Any]:
        """Run one layer; what the next one reads, or after the last one what `leave` does."""
        interpreter = self._with(self.layers[index].reads, values, shared, None)
        _run(interpreter, self.layers[index].nodes)
        reads = self.layers[index + 1].reads if index + 1 < len(self.layers) else self.end
        return [interpreter.env[node] for node in reads]

    def leave(self, values: Sequence[Any], shared: Shared) -> dict[str, Tensor]:
        """The program's outputs by name, from the values of `end`, of a walk that goes `to_end`."""
        interpreter = self._with(self.end, values, shared, None)
        _run(interpreter, self._suffix)
        made = interpreter.env[self._suffix[-1]]
        return dict(
            zip(self.program.task.outputs, made if isinstance(made, list | tuple) else (made,), strict=True)
        )

    def entry_tensors(self) -> list[str]:
        """Names of the parameters and buffers that `enter` uses."""
        return _tensors(self.program.root, self._prefix)

    def layer_tensors(self, index: int) -> list[str]:
        """Names of the parameters and buffers that a layer uses."""
        return _tensors(self.program.root, self.layers[index].nodes)

    def end_tensors(self) -> list[str]:
        """Names of the parameters and buffers that `leave` uses."""
        return _tensors(self.program.root, self._suffix)

    def _varying(self, samples: Sequence[Sample]) -> set[fx.Node]:
        """The values of the prefix that depend on which sample it is."""
        inputs = self.program.inputs
        if len({_shapes(inputs, sample) for sample in samples}) > 1:
            return _tainted(self._prefix, self._inputs, sized=True)
        own = [
            node
            for node, entry in zip(self._inputs, inputs, strict=True)
            if entry.default is None
            or any(not torch.equal(sample[entry.name], samples[0][entry.name]) for sample in samples)
        ]
        return _tainted(self._prefix, own)

    def _with(
        self, reads: Sequence[fx.Node], values: Sequence[Any], shared: Shared, observe: Observe | None
    ) -> Interpreter:
        interpreter = Interpreter(self.program.root, observe)
        # A layer may write to what it is given.
        interpreter.env = {
            node: value.clone() if isinstance(value := shared[node.name], Tensor) else value
            for node in self._shared
        }
        interpreter.env |= dict(zip(reads, values, strict=True))
        return interpreter

    def _reads(self, nodes: list[fx.Node], start: int, last: int) -> tuple[fx.Node, ...]:
        later = set(nodes[start:last])
        return tuple(
            node
            for node in nodes[:start]
            if node not in self._shared and node.op != "get_attr" and not later.isdisjoint(node.users)
        )


def _calls_units(program: Program, path: str) -> bool:
    """Whether the module at a path is a graph that calls units, itself or in those that it calls."""
    within = f"{in_model(path)}."
    return (
        in_model(path) not in program.units
        and any(unit.startswith(within) for unit in program.units)
        and isinstance(program.get_submodule(path), fx.GraphModule)
    )


def _groups(program: Program, calls: Sequence[tuple[int, str]]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Calls of units that must be walked as one: first and last position, and the units.

    Args:
        calls: positions in one graph, ascending, with the unit that each calls.
    """
    same = {unit: unit for unit in program.units}
    for name, first in program.tied.items():  # layers that share a weight are calibrated together
        if not {name, first} <= program.sites.keys():
            continue
        one, other = program.sites[name].layer, program.sites[first].layer
        if one in same and other in same:
            same = {unit: same[other] if kept == same[one] else kept for unit, kept in same.items()}
    last = {same[unit]: at for at, unit in calls}
    groups: list[tuple[int, int, tuple[str, ...]]] = []
    for at, unit in calls:
        end = last[same[unit]]
        if groups and at <= groups[-1][1]:
            start, final, known = groups.pop()
            groups.append((start, max(final, end), known if unit in known else (*known, unit)))
        else:
            groups.append((at, end, (unit,)))
    return groups


def _segment(nodes: list[fx.Node], start: int, stop: int) -> tuple[fx.Node, ...]:
    """Some nodes, after those before them that get parameters and buffers which they read."""
    own = nodes[start:stop]
    used = {each for node in own for each in node.all_input_nodes if each.op == "get_attr"}
    return (*(node for node in nodes[:start] if node in used), *own)


def _run(interpreter: Interpreter, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if node not in interpreter.env:
            interpreter.env[node] = interpreter.run_node(node)


def _shapes(inputs: Iterable[Input], sample: Sample) -> tuple[torch.Size, ...]:
    return tuple(sample[entry.name].shape for entry in inputs)


def _tainted(nodes: Iterable[fx.Node], inputs: Iterable[fx.Node], *, sized: bool = False) -> set[fx.Node]:
    """What depends on some inputs, and these; sizes do only where they are said to differ between samples."""
    found, count = {*inputs}, -1
    while count != len(found):  # what is written in place taints what was made before
        count = len(found)
        for node in nodes:
            if (sized or node.target is not SIZE) and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
                schema = getattr(node.target, "_schema", None)
                if schema is not None and schema.is_mutable:
                    found |= _bases(node)
    return found


def _bases(node: fx.Node) -> set[fx.Node]:
    """What an in-place operation may write to: its operands, and what they may be views of."""

    def tensors(of: fx.Node) -> list[fx.Node]:
        return [each for each in of.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]

    return set(reach(tensors(node), tensors))


def _tensors(root: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in _of_node(root, node)))


def _of_node(root: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    if node.op not in ("call_module", "get_attr"):
        return
    full = str(node.target)
    owner, _, attribute = full.rpartition(".")
    held: Any = root.get_submodule(owner)
    value = getattr(held, attribute)
    if attribute in held._parameters or attribute in held._buffers:
        yield full
    elif isinstance(value, torch.nn.Module):
        for name, _ in [*value.named_parameters(remove_duplicate=False), *value.named_buffers()]:
            yield f"{full}.{name}"
