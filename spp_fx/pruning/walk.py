"""Running a program one decoder layer at a time over many samples, and where their values wait between layers.

The graph says what each layer needs: the values that later layers read are all that has to be kept between
two of them. Those that depend on the sample's tokens (hidden states) are kept for each sample; the others
(positions, masks) are functions of the sequence's length and made once.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx
from torch.fx.node import map_arg

from spp_fx.errors import FormatError, PreconditionError
from spp_fx.graph.leaves import run_leaf
from spp_fx.graph.program import SITE, Program, Use, child_path
from spp_fx.graph.rewrite import reach
from spp_fx.storage.output import fsync_file, fsync_folder

SIZE = torch.ops.aten.sym_size.int

Observe = Callable[[fx.Node, tuple[Any, ...]], None]
"""Called with each node that contracts a site, or is a leaf, and its arguments, before it runs."""
Shared = dict[str, Any]
"""Values by the names of their nodes: those that are the same for every sample."""


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
    """A decoder layer.

    Attributes:
        path: of its unit.
        nodes: the node that calls it, and those that run before the next one is called.
        reads: values from before it, that it or a later layer reads, and that depend on the sample.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]


class Walk:
    """The layers of a partitioned program in the order in which they run.

    Attributes:
        end: values from before the end of the last layer that depend on the sample and are read after it; only
            where the walk goes `to_end`, which keeps them from layer to layer.

    Raises:
        PreconditionError: the program has no units, or they are not called one after another by one graph.
    """

    def __init__(self, program: Program, *, to_end: bool = False) -> None:
        if not program.units:
            raise PreconditionError("calibration walks layer by layer: run partition first")
        self.program = program
        owner, self._way = _way_in(program)
        self._owner = owner
        nodes = list(owner.module.graph.nodes)
        calls = [
            i
            for i, node in enumerate(nodes)
            if node.op == "call_module" and child_path(owner.path, node) in program.units
        ]
        self._prefix, self._suffix = nodes[: calls[0]], nodes[calls[-1] + 1 :]
        last = len(nodes) if to_end else calls[-1] + 1
        later = set(nodes[calls[0] : last])
        self._shared = {
            node for node in _untainted(self._way, owner, self._prefix) if not later.isdisjoint(node.users)
        }
        stops = [*calls[1:], calls[-1] + 1]
        self.layers = tuple(
            Layer(
                child_path(owner.path, nodes[start]),
                tuple(nodes[start:stop]),
                self._reads(nodes, start, last),
            )
            for start, stop in zip(calls, stops, strict=True)
        )
        self.end = self._reads(nodes, stops[-1], last)

    def enter(self, tokens: Tensor) -> tuple[list[Any], Shared]:
        """What the first layer reads of a sample, and what all samples share.

        Args:
            tokens: (1, length) int64.
        """
        _, arguments = self._enter_owner(tokens)
        interpreter = _started(self._owner.module, arguments)
        _run(interpreter, self._prefix)
        values = [interpreter.env[node] for node in self.layers[0].reads]
        return values, {node.name: interpreter.env[node] for node in self._shared}

    def observe(self, index: int, values: Sequence[Any], shared: Shared, observe: Observe) -> None:
        """Run one layer on what it reads, showing the nodes that contract sites."""
        interpreter = self._at(index, values, shared, observe)
        interpreter.run_node(self.layers[index].nodes[0])

    def run(self, index: int, values: Sequence[Any], shared: Shared) -> list[Any]:
        """Run one layer; what the next one reads, or after the last one what `leave` does."""
        interpreter = self._at(index, values, shared, None)
        _run(interpreter, self.layers[index].nodes)
        reads = self.layers[index + 1].reads if index + 1 < len(self.layers) else self.end
        return [interpreter.env[node] for node in reads]

    def leave(self, tokens: Tensor, values: Sequence[Any], shared: Shared) -> Tensor:
        """The logits (1, length, vocabulary) from the values of `end`, of a walk that goes `to_end`.

        Args:
            tokens: (1, length) int64, as `enter` took them.
        """
        interpreters, _ = self._enter_owner(tokens)
        interpreter = self._with(self.end, values, shared, None)
        _run(interpreter, self._suffix)
        result = interpreter.env[self._suffix[-1]]
        for use, outer in zip(reversed(self._way), reversed(interpreters), strict=True):
            outer.env[use.node] = result
            nodes = _from(use.node)[1:]
            _run(outer, nodes)
            result = outer.env[nodes[-1]]
        return result

    def entry_tensors(self) -> list[str]:
        """Names of the parameters and buffers that `enter` uses."""
        names = [name for use in self._way for name in _tensors(use.path, use.module, _before(use.node))]
        return names + _tensors(self._owner.path, self._owner.module, self._prefix)

    def layer_tensors(self, index: int) -> list[str]:
        """Names of the parameters and buffers that a layer uses."""
        return _tensors(self._owner.path, self._owner.module, self.layers[index].nodes)

    def end_tensors(self) -> list[str]:
        """Names of the parameters and buffers that `leave` uses."""
        names = _tensors(self._owner.path, self._owner.module, self._suffix)
        for use in self._way:
            nodes = [*_before(use.node), *_from(use.node)[1:]]
            names += _tensors(use.path, use.module, nodes)
        return list(dict.fromkeys(names))

    def _enter_owner(self, tokens: Tensor) -> tuple[list[Interpreter], Sequence[Any]]:
        """The graphs on the way to the one that calls the layers, each run up to that call, and its arguments."""
        arguments: Sequence[Any] = (tokens, torch.ones_like(tokens))
        interpreters: list[Interpreter] = []
        for use in self._way:
            interpreter = _started(use.module, arguments)
            _run(interpreter, _before(use.node))
            arguments, _ = interpreter.fetch_args_kwargs_from_env(use.node)
            interpreters.append(interpreter)
        return interpreters, arguments

    def _at(self, index: int, values: Sequence[Any], shared: Shared, observe: Observe | None) -> Interpreter:
        return self._with(self.layers[index].reads, values, shared, observe)

    def _with(
        self, reads: Sequence[fx.Node], values: Sequence[Any], shared: Shared, observe: Observe | None
    ) -> Interpreter:
        interpreter = Interpreter(self._owner.module, observe)
        # A layer may write to what it is given.
        interpreter.env = {
            node: value.clone() if isinstance(value := shared[node.name], Tensor) else value
            for node in self._shared
        }
        interpreter.env |= dict(zip(reads, values, strict=True))
        return interpreter

    def _reads(self, nodes: list[fx.Node], start: int, last: int) -> tuple[fx.Node, ...]:
        later = set(nodes[start:last])
        return tuple(n for n in nodes[:start] if n not in self._shared and not later.isdisjoint(n.users))


def _way_in(program: Program) -> tuple[Use, list[Use]]:
    """The graph that calls the units (with its first call), and the calls that lead to it from the root."""
    calls = program.calls()
    first: dict[str, Use] = {}
    for use in (use for unit in program.units for use in calls.get(unit, [])):
        if use.node.op != "call_module":
            raise PreconditionError("calibration needs layers that are not checkpointed")
        first.setdefault(use.path, use)
    if len(first) != 1:
        raise PreconditionError(f"the decoder layers are called by {len(first)} graphs, expected one")
    (owner,) = first.values()
    way: list[Use] = []
    path = owner.path
    while path:
        callers = [use for use in calls.get(path, []) if use.node.op == "call_module"]
        if not callers:
            raise PreconditionError(f"{path}: the graph of the layers is not called by a module")
        way.insert(0, callers[-1])
        path = callers[-1].path
    return owner, way


def _before(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[: nodes.index(node)]


def _from(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) :]


def _started(module: fx.GraphModule, arguments: Sequence[Any]) -> Interpreter:
    interpreter = Interpreter(module)
    interpreter.env = dict(zip(module.graph.find_nodes(op="placeholder"), arguments, strict=True))
    return interpreter


def _run(interpreter: Interpreter, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if node not in interpreter.env:
            interpreter.env[node] = interpreter.run_node(node)


def _untainted(way: Sequence[Use], owner: Use, prefix: Sequence[fx.Node]) -> set[fx.Node]:
    """The values of the prefix that do not depend on which tokens the sample holds."""
    tainted = [True, False]  # input_ids, attention_mask
    for use in way:
        inside = _tainted(use.module, _before(use.node), tainted)
        tainted = [not inside.isdisjoint(_nodes(a)) for a in (*use.node.args, *use.node.kwargs.values())]
    inside = _tainted(owner.module, prefix, tainted)
    return {node for node in prefix if node not in inside}


def _tainted(module: fx.GraphModule, nodes: Sequence[fx.Node], arguments: Sequence[bool]) -> set[fx.Node]:
    placeholders = module.graph.find_nodes(op="placeholder")
    found = {node for node, flag in zip(placeholders, arguments, strict=True) if flag}
    count = -1
    while count != len(found):  # what is written in place taints what was made before
        count = len(found)
        for node in nodes:
            # Sizes of what depends on the tokens do not.
            if node.target is not SIZE and not found.isdisjoint(node.all_input_nodes):
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


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return found


def _tensors(path: str, module: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in _of_node(path, module, node)))


def _of_node(path: str, module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    if node.op not in ("call_module", "get_attr"):
        return
    full = child_path(path, node)
    owner, _, attribute = str(node.target).rpartition(".")
    held: Any = module.get_submodule(owner)
    value = getattr(held, attribute)
    if attribute in held._parameters or attribute in held._buffers:
        yield full
    elif isinstance(value, torch.nn.Module):
        for name, _ in [*value.named_parameters(remove_duplicate=False), *value.named_buffers()]:
            yield f"{full}.{name}"
