"""Tracing: a Hugging Face model to a tree of torch.fx graphs under the checkpoint's own names."""

import contextlib
import copy
import gc
import inspect
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, unflatten
from torch.func import functional_call
from torch.fx import config as fx_config
from torch.fx.experimental import _config as shapes_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from spp_fx.errors import SppFxError, UsageError
from spp_fx.graph.dropout import has_dropout, open_dropout, recorded_dropout, write_dropout
from spp_fx.graph.leaves import Leaves, leaf_classes, without_leaves
from spp_fx.graph.model import load_model
from spp_fx.graph.names import names_of
from spp_fx.graph.program import Program
from spp_fx.graph.reserved_names import hide_keywords, refuse_names, shown, spell
from spp_fx.graph.rewrite import Graph
from spp_fx.graph.sizes import Sizes, sizes_of
from spp_fx.graph.task import (
    BATCH,
    EXAMPLE,
    LENGTH,
    TARGET,
    Input,
    Task,
    find_task,
    positions_of,
    task_of_model,
)
from spp_fx.graph.untouched import untouched

aten = torch.ops.aten
GUARDS = (aten._assert_tensor_metadata.default,)
EXPORT_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    NameError,
    ImportError,
    SyntaxError,
)
"""What torch.export, the model's code that it runs, and generated code raise."""
NO_DROPOUT = "set its dropout options to 0 in config.json"
T = TypeVar("T")


def trace(
    model: PreTrainedModel | str | Path,
    example: Mapping[str, int] = EXAMPLE,
    *,
    task: Task | str | None = None,
) -> Program:
    """Trace a model into a `Program` that shares the model's parameters.

    The model is exported (non-strict, dynamic batch and sequence) and unflattened; no weight is
    copied, and a model on the meta device needs none. The program computes what the model computes in
    its own dtype and on its own device, to the bit.

    Args:
        model: of transformers, or a model folder (or hub id, where there is a network), which is then loaded in its
            stored dtype on the CPU.
        example: sizes of axes by name. Where the model's code branches on them, the trace has the branches of these,
            and holds for `Program.sizes`; for others the program traces the model again.
        task: what the model is run for, or its name; None: what its class is made for.

    Raises:
        UsageError: the model is of no task that is known, or not of this one.
        SppFxError: the model cannot be exported; carries torch.export's reason.
    """
    task = find_task(task) if isinstance(task, str) else task
    if isinstance(model, str | Path):
        model = load_model(model, task=task)
    task = task or task_of_model(model)
    if not task.takes(model):
        raise UsageError(
            f"{type(model).__name__} cannot be run for {task.name} ({task.auto} of transformers)"
        )
    refuse_names(model)
    with _collecting_new_objects():
        program = _trace(model, task, EXAMPLE | dict(example))
    if program.sizes.conditions:
        program.again = TraceAgain.of(model, task, leaf_classes(program))
    return program


def _trace(
    model: PreTrainedModel, task: Task, example: Mapping[str, int], classes: frozenset[type] = frozenset()
) -> Program:
    inputs, leaves = task.inputs(model), Leaves(model, classes)
    exported = _export(model, task, example, leaves)
    sizes, fakes = _sizes(model, exported, inputs), _Fakes()
    if has_dropout(model.config.to_dict()):
        _training_dropout(model, exported, task, example, leaves, fakes)
    root = _tree(exported, model)
    leaves.place(root)
    loss = getattr(model, "loss_function", None)
    program = Program(root, task, inputs, model.config, loss, tied_parameters(model), head_of(model))
    program.language = language_of(model)
    program.dtype, program.positions = model.dtype, positions_of(model)
    program.sizes = sizes
    program.constants = frozenset(dict(program.named_buffers()).keys() - dict(model.named_buffers()).keys())
    # Most families without a loss of their own have no loss_type, either: the Trainer would count tokens wrongly.
    program.loss_type = next((n for n, each in LOSS_MAPPING.items() if each is loss), None)
    _rehearse(program, model, dict(example), fakes)
    return program.train(model.training)


@contextmanager
def _collecting_new_objects() -> Generator[None, None, None]:
    """Let garbage collection pass over the objects that exist: there are so many of them, and a trace makes so many
    more, that a collection of half a second would come in every second trace."""
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@dataclass(frozen=True)
class TraceAgain:
    """Traces a model for other examples.

    Attributes:
        model: its structure and buffers; parameters are on the meta device. It is never changed.
        classes: of the modules that are leaves.
    """

    model: PreTrainedModel
    task: Task
    classes: frozenset[type] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel, task: Task, classes: frozenset[type]) -> "TraceAgain | None":
        """None for a model that cannot be copied, or in which a function that knows it stands for a forward."""
        if any(isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()):
            return None
        metas = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        try:
            return cls(copy.deepcopy(model, dict[int, Any](metas)), task, classes)
        except (RuntimeError, TypeError):  # a tensor with a gradient, a lock, a handle
            return None

    def __call__(self, example: Mapping[str, int], device: torch.device) -> Program:
        """A program whose parameters are yet to be replaced.

        A trace needs the device of parameters and not their values: all of a dtype are views of one storage.
        """
        model = copy.deepcopy(self.model)
        most: dict[torch.dtype, int] = {}
        for parameter in model.parameters():
            most[parameter.dtype] = max(most.get(parameter.dtype, 0), parameter.numel())
        storage = {dtype: torch.empty(numel, dtype=dtype, device=device) for dtype, numel in most.items()}
        stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in model.parameters():
            view = storage[parameter.dtype][: parameter.numel()].view(parameter.shape)
            stand_ins[parameter] = nn.Parameter(view, parameter.requires_grad)
        for module in model.modules():
            module._parameters.update(
                {n: stand_ins[p] for n, p in module._parameters.items() if p is not None}
            )
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        with _collecting_new_objects():
            return _trace(model, self.task, example, self.classes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TraceAgain":
        return self


def _export(
    model: PreTrainedModel, task: Task, example: Mapping[str, int], leaves: Leaves
) -> ExportedProgram:
    """Export the task's inputs to its outputs in eval mode, with the checkpoint's names at the top level."""
    inputs = task.inputs(model)
    device = next(model.parameters()).device
    args = tuple(entry.filled(example, model.dtype, device) for entry in inputs)
    # A size that the model's code branches on is narrowed, or becomes a constant, see `Sizes`.
    sizes = tuple(
        {n: Dim.AUTO for n, axis in enumerate(entry.axes) if isinstance(axis, str) and example[axis] > 1}
        for entry in inputs
    )
    # Export takes a size for more than 1 and says nothing of it; so it asks, and what was assumed is a condition.
    with (
        shapes_config.patch(backed_size_oblivious=True),  # pyright: ignore[reportAttributeAccessIssue]
        patch.object(fx_config, "do_not_emit_stack_traces", True, create=True),  # torch 2.11 emits them
    ):
        return export_as(model, forward_of(model, task), args, sizes, leaves)


def forward_of(model: PreTrainedModel, task: Task) -> Callable[..., Any]:
    """A function of the task's inputs, with their names, that gives its outputs: one alone, or a tuple."""
    own, names = model.forward, [entry.name for entry in task.inputs(model)]
    options = {"use_cache": False} if task.cached else {}

    def forward(*given: Tensor) -> Any:
        made = own(**dict(zip(names, given, strict=True)), **options)
        outputs = tuple(made[name] for name in task.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _sizes(model: PreTrainedModel, exported: ExportedProgram, inputs: tuple[Input, ...]) -> Sizes:
    try:
        return sizes_of(exported, inputs)
    except SppFxError as error:
        raise SppFxError(f"{type(model).__name__} cannot be traced: {error}") from error


def export_as(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    leaves: Leaves | None = None,
) -> ExportedProgram:
    """Export (non-strict) another signature of a model in eval mode; names are its own, and it is left as it was.

    Args:
        model: on the meta device, or with weights that are never read.
        forward: stands in for the model's own while it is exported.
        args, dynamic_shapes: as torch.export takes them.
        leaves: modules that are not looked into; those that cannot be exported are added. None: there are to be none.

    Raises:
        SppFxError: the model cannot be exported; carries torch.export's reason.
    """

    def export() -> ExportedProgram:
        return torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)

    return _attempt(model, forward, leaves, export)


def _attempt(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    leaves: Leaves | None,
    run: Callable[[], T],
    *,
    training: bool = False,
) -> T:
    """What `run` makes of a model in one mode with another forward, until no further leaf lets it succeed."""
    while True:
        try:
            with untouched(model), _quiet(), torch.no_grad():
                model.train(training)
                _make_experts_exportable(model)
                if leaves is not None:
                    leaves.put_in_place()
                vars(model)["forward"] = forward
                return run()
        except EXPORT_ERRORS as error:
            reason = _reason(error)
            if leaves is not None and leaves.grow(error, reason):
                continue
            said = without_leaves(model, error, reason) if leaves is None else leaves.why()
            who = f" while training ({NO_DROPOUT}): torch" if training else ": torch.export"
            raise SppFxError(f"{type(model).__name__} cannot be traced{who} says: {said}") from error


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silence torch's logs, warnings and printed graphs, unless TORCH_LOGS is set."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    loggers = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")
    ]
    for logger in loggers:
        logger.addFilter(_drop)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


# Lines of torch.export's messages that explain how to debug torch, or repeat other lines.
_ADVICE = re.compile(
    r"For (more|extended|C\+\+)|If you suspect|The error above|consider using data-dependent|Consider annotating"
    r"|Caused by:|The following call raised|User (code|stack)|\(snipped|Traceback|from user code|To fix the error"
)
_NOT_A_MODEL = (*torch.__path__, str(Path(__file__).parents[1]), contextlib.__file__, "<")
_LONGEST_REASON = 600
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+')


def _reason(error: BaseException) -> str:
    """The reason, the suggested fix and the model's line from an error of torch.export, in one line."""
    said: list[str] = []
    where = ""
    lines = iter(str(error).splitlines())
    for line in map(str.strip, lines):
        if found := _FRAME.match(line):
            where = f"{_short(found['file'])}:{found['line']}, {next(lines, '').strip()}"
        elif line and not _ADVICE.match(line):
            words = re.sub(r"\s*For more information, run with TORCH_LOGS=\S+", "", line)
            words = words.removeprefix("- ").rstrip(".!")
            if words not in said:
                said.append(words)
    if not where:
        # The innermost line of Python that is neither torch's nor ours is the model's.
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_A_MODEL)]
        where = f"{_short(theirs[-1].filename)}:{theirs[-1].lineno}, {theirs[-1].line}" if theirs else ""
    text = "; ".join(said).replace(":; ", ": ")[:_LONGEST_REASON] or type(error).__name__
    return f"{text} (at {where})" if where else text


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2]


def _make_experts_exportable(model: PreTrainedModel) -> None:
    """Run experts as grouped matrix products while exporting: the eager loop depends on the data."""
    stacked = any(
        parameter.ndim == 3 and name.rpartition(".")[0].endswith("experts")
        for name, parameter in model.named_parameters()
    )
    if stacked and getattr(model.config, "_experts_implementation", None) == "eager":
        with suppress(ValueError):  # its code has one way to run them, which may be traced as it is
            model.set_experts_implementation("grouped_mm")


class _Fakes:
    """Runs modules on fake tensors: no memory, no arithmetic."""

    def __init__(self) -> None:
        # As torch.export: an assertion about data holds.
        env = ShapeEnv(trace_asserts=True)
        self.mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)

    def run(
        self, module: nn.Module, inputs: Iterable[Input], sizes: Mapping[str, int], dtype: torch.dtype
    ) -> Any:
        """What a module makes of inputs of some sizes. Modules that share a tensor share its fake."""
        own = dict(module.named_parameters(remove_duplicate=False))
        own |= dict(module.named_buffers(remove_duplicate=False))
        fakes: dict[str, Tensor] = {
            name: self.mode.from_tensor(tensor, static_shapes=True) for name, tensor in own.items()
        }
        device = next(module.parameters()).device
        with self.mode, _quiet(), torch.no_grad():
            return functional_call(
                module, fakes, tuple(entry.filled(sizes, dtype, device) for entry in inputs)
            )


def _training_dropout(
    model: PreTrainedModel,
    exported: ExportedProgram,
    task: Task,
    example: Mapping[str, int],
    leaves: Leaves,
    fakes: _Fakes,
) -> None:
    """Write into an exported graph the dropout probabilities that the model has while training.

    Raises:
        SppFxError: while training the model takes another path, by its calls of dropout, or depends on data.
    """
    with recorded_dropout(model) as calls:

        def run() -> None:
            calls.clear()
            with patch.multiple(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=True):
                fakes.run(model, task.inputs(model), example, model.dtype)

        _attempt(model, forward_of(model, task), leaves, run, training=True)
    if not write_dropout(exported, model, calls):
        raise SppFxError(
            f"{type(model).__name__} takes another path while training (layer drop?), which a program cannot; "
            f"{NO_DROPOUT}"
        )


def _tree(exported: ExportedProgram, model: PreTrainedModel) -> fx.GraphModule:
    """Unflatten without copying a weight: with meta tensors, which the model's tensors then replace."""
    metas: dict[int, Tensor] = {}
    for name, tensor in exported.state_dict.items():
        meta = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, tensor.requires_grad)
        exported.state_dict[name] = metas.setdefault(id(tensor), meta)
    hide_keywords(exported)
    try:
        # Its graphs get their code below, once their names are those of the program.
        with _quiet(), patch.object(fx.GraphModule, "recompile"):
            tree = unflatten(exported)
    except EXPORT_ERRORS as error:
        raise SppFxError(
            f"{type(model).__name__} cannot be traced: torch.export.unflatten says: {_reason(error)}"
        ) from error
    root = cast(fx.GraphModule, _with_generated_code(tree))
    stored = model.state_dict().keys()
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for path, module in root.named_modules():
        # A module called n times is in the tree n times, as name, name@1, ...
        prefix = re.sub(r"@\d+", "", path)
        _, *tables = _tables(module)
        for table in tables:
            for name in table:
                table[name] = own.get(f"{prefix}.{name}".lstrip("."), table[name])
        # Buffers that the model computes and does not store stay out of the program's state as well.
        module._non_persistent_buffers_set = {
            n for n in module._buffers if f"{prefix}.{n}".lstrip(".") not in stored
        }
    return root


def _with_generated_code(module: nn.Module) -> nn.Module:
    """An unflattened tree, whose modules interpret their graphs, as graph modules with generated code."""
    tables = _tables(module)
    for table in tables:
        for name in list(table):
            table[shown(name)] = table.pop(name)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _with_generated_code(child)
    graph = getattr(module, "graph", None)
    if graph is None:
        return module
    for node in list(graph.nodes):
        if node.target in GUARDS:
            graph.erase_node(node)
        elif node.op in ("call_module", "get_attr"):
            node.target = shown(node.target)
    open_dropout(graph)
    spell(graph)
    if isinstance(module, fx.GraphModule):  # the body of a higher-order operator
        module.recompile()
        return module
    for node in graph.nodes:
        if node.op == "output" and isinstance(node.args[0], tuple) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)
    result = Graph(module, graph, class_name="Graph")
    # GraphModule takes only what its graph names; containers and unused parameters belong to the tree too.
    for own, theirs in zip(_tables(result), tables, strict=True):
        own.update(theirs)
    return result


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    return [cast("dict[str, Any]", t) for t in (module._modules, module._parameters, module._buffers)]


def _rehearse(program: Program, model: PreTrainedModel, example: dict[str, int], fakes: _Fakes) -> None:
    """Run a program once on fake tensors, in training mode if it has one: that takes the ops of both modes.

    Raises:
        SppFxError: the generated code does not run, or makes outputs of other sizes than its inputs have.
    """
    # Other sizes than those that it was exported with, where it takes others.
    tried = (example | {BATCH: 3, LENGTH: 5, TARGET: 4}, example | {BATCH: 3}, example)
    sizes = next(each for each in tried if program.sizes.admit(**each))
    try:
        made = fakes.run(program.train(), program.inputs, sizes, model.dtype)
    except EXPORT_ERRORS as error:
        raise SppFxError(
            f"{type(model).__name__} cannot be traced: torch exports it, but what it exports does not run: "
            f"{_reason(error)}"
        ) from error
    for name, axes in program.task.outputs.items():
        shape, wanted = tuple(made[name].shape), tuple(sizes[axis] for axis in axes)
        if shape[: len(axes)] != wanted:
            raise SppFxError(
                f"{type(model).__name__} cannot be traced: the program makes {name} of shape {shape}, and they "
                f"should begin with {', '.join(axes)} {wanted}"
            )


def language_of(model: PreTrainedModel) -> str:
    """The path of the language model in a model of several modalities; empty where it is the whole."""
    if model.config.get_text_config() is model.config or not hasattr(model.config, "vision_config"):
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another parameter under a second name: name -> the first name."""
    return {other: first for first, *others in names_of(model).values() for other in others}


def head_of(model: PreTrainedModel) -> str | None:
    """Name of the weight that makes logits of hidden states."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    path = next((path for path, module in model.named_modules() if module is head), None)
    return None if weight is None or path is None else f"{path}.weight"
