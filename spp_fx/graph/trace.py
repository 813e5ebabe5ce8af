"""Tracing: a Hugging Face model to a tree of torch.fx graphs under the checkpoint's own names."""

import contextlib
import copy
import inspect
import io
import logging
import operator
import os
import re
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, unflatten
from torch.func import functional_call
from torch.fx.experimental import _config as shapes_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from spp_fx.errors import SppFxError, UsageError
from spp_fx.graph.flow import argument
from spp_fx.graph.leaves import Leaves, leaf_classes, without_leaves
from spp_fx.graph.model import load_model
from spp_fx.graph.names import names_of
from spp_fx.graph.program import Program
from spp_fx.graph.reserved_names import hide_keywords, refuse_names, shown, spell
from spp_fx.graph.rewrite import Graph, call, training_flag
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
ATTENTION = aten.scaled_dot_product_attention.default
DROPOUT = aten.dropout.default
# Ops that drop -> the name of their probability.
_PROBABILITIES: dict[object, str] = {ATTENTION: "dropout_p", DROPOUT: "p"}
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
    program = _trace(model, task, EXAMPLE | dict(example))
    if program.sizes.conditions:
        program.again = TraceAgain.of(model, task, leaf_classes(program))
    return program


def _trace(
    model: PreTrainedModel, task: Task, example: Mapping[str, int], classes: frozenset[type] = frozenset()
) -> Program:
    inputs, leaves = task.inputs(model), Leaves(model, classes)
    exported = _export(model, task, example, leaves, training=False)
    conditions = (
        *_sizes(model, exported, inputs).conditions,
        *_training_dropout(model, exported, task, example, leaves),
    )
    root = _tree(exported, model)
    leaves.place(root)
    loss = getattr(model, "loss_function", None)
    program = Program(root, task, inputs, model.config, loss, tied_parameters(model), head_of(model))
    program.language = language_of(model)
    program.dtype, program.positions = model.dtype, positions_of(model)
    program.sizes = Sizes(tuple(dict.fromkeys(conditions)))
    program.constants = frozenset(dict(program.named_buffers()).keys() - dict(model.named_buffers()).keys())
    # Most families without a loss of their own have no loss_type, either: the Trainer would count tokens wrongly.
    program.loss_type = next((n for n, each in LOSS_MAPPING.items() if each is loss), None)
    _rehearse(program, model, dict(example))
    return program.train(model.training)


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
        return _trace(model, self.task, example, self.classes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TraceAgain":
        return self


def _export(
    model: PreTrainedModel, task: Task, example: Mapping[str, int], leaves: Leaves, *, training: bool
) -> ExportedProgram:
    """Export the task's inputs to its outputs in one mode, with the checkpoint's names at the top level."""
    inputs = task.inputs(model)
    device = next(model.parameters()).device
    args = tuple(entry.filled(example, model.dtype, device) for entry in inputs)
    # A size that the model's code branches on is narrowed, or becomes a constant, see `Sizes`.
    sizes = tuple(
        {n: Dim.AUTO for n, axis in enumerate(entry.axes) if isinstance(axis, str) and example[axis] > 1}
        for entry in inputs
    )
    # Export takes a size for more than 1 and says nothing of it; so it asks, and what was assumed is a condition.
    with shapes_config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
        return export_as(model, forward_of(model, task), args, sizes, leaves, training=training)


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
    *,
    training: bool | None = None,
) -> ExportedProgram:
    """Export (non-strict) another signature of a model; names are the model's own, and it is left as it was.

    Args:
        model: on the meta device, or with weights that are never read.
        forward: stands in for the model's own while it is exported.
        args, dynamic_shapes: as torch.export takes them.
        leaves: modules that are not looked into; those that cannot be exported are added. None: there are to be none.
        training: the mode to export; None for the model's own.

    Raises:
        SppFxError: the model cannot be exported; carries torch.export's reason.
    """
    while True:
        try:
            with untouched(model), _quiet(), torch.no_grad():
                if training is not None:
                    model.train(training)
                _make_experts_exportable(model)
                if leaves is not None:
                    leaves.put_in_place()
                vars(model)["forward"] = forward
                return torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
        except EXPORT_ERRORS as error:
            reason = _reason(error)
            if leaves is not None and leaves.grow(error, reason):
                continue
            said = without_leaves(model, error, reason) if leaves is None else leaves.why()
            raise SppFxError(f"{type(model).__name__} cannot be traced: torch.export says: {said}") from error


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


def _training_dropout(
    model: PreTrainedModel, exported: ExportedProgram, task: Task, example: Mapping[str, int], leaves: Leaves
) -> tuple[str, ...]:
    """Write into the exported graph the dropout probabilities that the model has while training.

    Returns the conditions on sizes under which training takes the same path, see `Sizes`.

    Export in eval mode bakes attention dropout in as 0. A second export, in training mode, has the
    probabilities; everything else is taken from the first, which is the model's own eval path.
    """
    if not _has_dropout(model.config.to_dict()):
        return ()
    twin = _export(model, task, example, leaves, training=True)
    own, theirs = _dropouts(exported), _dropouts(twin)
    if [where for where, _ in own] != [where for where, _ in theirs]:
        raise SppFxError(
            f"{type(model).__name__} takes another path while training (layer drop?), which a program "
            "cannot; set its dropout options to 0 in config.json"
        )
    for (_, node), (_, source) in zip(own, theirs, strict=True):
        _set_dropout(node, argument(source, _PROBABILITIES[node.target]), training=False)
    return _sizes(model, twin, task.inputs(model)).conditions


def _has_dropout(config: dict[str, Any]) -> bool:
    return any(
        _has_dropout(value)
        if isinstance(value, dict)
        else "drop" in str(key) and isinstance(value, float) and value > 0
        for key, value in config.items()
    )


def _dropouts(exported: ExportedProgram) -> list[tuple[tuple[str, str], fx.Node]]:
    """Dropout nodes in order, each with its target and the path of the module that owns it."""
    return [
        ((str(node.target), str(list(node.meta.get("nn_module_stack", {}).values())[-1:])), node)
        for node in exported.graph.nodes
        if node.target in _PROBABILITIES
    ]


def _set_dropout(node: fx.Node, p: Any, *, training: Any) -> None:
    if node.target == ATTENTION:
        options = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p")}
        node.args = (*node.args[:3], argument(node, "attn_mask"), p, *node.args[5:])
        node.kwargs = options
    else:
        node.args = (node.args[0], p, training)


def _open_dropout(graph: fx.Graph) -> None:
    """Make dropout follow the `training` flag of the graph module."""
    for node in list(graph.nodes):
        if node.target in _PROBABILITIES and (p := argument(node, _PROBABILITIES[node.target])) != 0:
            with graph.inserting_before(node):
                training = training_flag(graph)
                share = call(graph, operator.mul, p, training) if node.target == ATTENTION else p
            _set_dropout(node, share, training=training)


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
        with _quiet():
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
    _open_dropout(graph)
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


def _rehearse(program: Program, model: PreTrainedModel, example: dict[str, int]) -> None:
    """Run a program once in each mode that differs, on fake tensors: no memory, no arithmetic.

    Raises:
        SppFxError: the generated code does not run, or makes outputs of other sizes than its inputs have.
    """
    # Other sizes than those that it was exported with, where it takes others.
    tried = (example | {BATCH: 3, LENGTH: 5, TARGET: 4}, example | {BATCH: 3}, example)
    sizes = next(each for each in tried if program.sizes.admit(**each))
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    own = dict(program.named_parameters(remove_duplicate=False))
    own |= dict(program.named_buffers(remove_duplicate=False))
    fakes: dict[int, Tensor] = {}
    for tensor in own.values():
        if id(tensor) not in fakes:
            fakes[id(tensor)] = mode.from_tensor(tensor, static_shapes=True)
    stand_ins = {name: fakes[id(tensor)] for name, tensor in own.items()}
    switched = any(n.target == "training" for _, graph in program.graphs() for n in graph.graph.nodes)
    for training in (False, True) if switched else (False,):
        try:
            with mode, _quiet(), torch.no_grad():
                program.train(training)
                given = [entry.filled(sizes, model.dtype, program.device) for entry in program.inputs]
                made = functional_call(program, stand_ins, tuple(given))
        except EXPORT_ERRORS as error:
            raise SppFxError(
                f"{type(model).__name__} cannot be traced: torch exports it, but what it exports does not run"
                f"{' in training mode' if training else ''}: {_reason(error)}"
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
