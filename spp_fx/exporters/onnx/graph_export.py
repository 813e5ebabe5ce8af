"""A model as one ONNX graph without its weights, which have the checkpoint's names.

The optimizer of torch.onnx folds `Transpose(weight)` into new constants, merges equal weights and renames them.
Here the graph is simplified with every weight pinned: a parameter that the outputs depend on stays one initializer,
named and oriented as in the model; tied parameters share the one of the first name. The numbers are never read.

Inputs and outputs have Optimum's names and axes. Where layers attend to a window only, the cache keeps everything
and the mask does the windowing, so that the inputs of all layers have one form.
"""

import contextlib
import inspect
import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import opset18, optimizer
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.graph_parameters import Graph, GraphParameter
from spp_fx.exporters.onnx.onnx_file import all_graphs
from spp_fx.graph.dropout import ATTENTION
from spp_fx.graph.sizes import ANY_SIZES, Sizes, sizes_of
from spp_fx.graph.task import BATCH as ROWS
from spp_fx.graph.task import EXAMPLE, FRAMES, LENGTH, TARGET, Input, Task, task_of_model
from spp_fx.graph.trace import export_as, forward_of

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
STRIDED = (aten.transpose.int, aten.permute.default, aten.contiguous.default)

OPSET = 18
BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "past_sequence_length + sequence_length",
)
ENCODER_SEQUENCE, DECODER_SEQUENCE = "encoder_sequence_length", "decoder_sequence_length"
AXES = {ROWS: BATCH, LENGTH: SEQUENCE, TARGET: DECODER_SEQUENCE, FRAMES: ENCODER_SEQUENCE}
"""Optimum's names of the axes of tasks; tokens of an encoder beside a decoder are `ENCODER_SEQUENCE`."""
SIZES = EXAMPLE | {LENGTH: 8, TARGET: 6}
Axes = Mapping[int, str]


@dataclass(frozen=True)
class Signature:
    """A model exported by torch with example arguments, and the dynamic axes of its inputs and outputs by name.

    Attributes:
        sizes: that it takes.
    """

    program: ExportedProgram
    args: tuple[Any, ...]
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    sizes: Sizes = ANY_SIZES


def build_graph(model: PreTrainedModel, *, task: Task | None = None, with_past: bool = False) -> Graph:
    """Export a model with dynamic axes for what varies, such as the batch size and the sequence length.

    Args:
        model: in eval mode on the CPU, float32, float16 or bfloat16; its parameters are never read (see
            `graph.model.hollow_model`), its buffers are real.
        task: None: what its class is made for.
        with_past: of a causal language model, with a key/value cache, see `cached_signature`.

    Raises:
        SppFxError: the model is in training mode, cannot be traced, an operator has no ONNX form, or a
            dimension would come out fixed.
    """
    if model.training:
        raise SppFxError("the model is in training mode: dropout would be exported; call eval() first")
    names = _first_names(model)
    with _quiet():
        signature = (
            cached_signature(model) if with_past else plain_signature(model, task or task_of_model(model))
        )
        _translatable(signature.program)
        try:
            program = torch.onnx.export(
                signature.program,
                signature.args,
                dynamo=True,
                optimize=False,
                external_data=False,
                verbose=False,
                opset_version=OPSET,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                custom_translation_table=_translations(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise SppFxError(f"the model has no ONNX form: {_root_cause(error)}") from error
        assert program is not None
        graph = program.model.graph
        own = _name_parameters(graph, names)
        _simplify(program.model, own)
        _name_axes(graph, signature)
        parameters = _take_out_parameters(graph, own)
        proto = ir.to_proto(program.model)
    _strip(proto)
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    bfloat16 = sizes.most_common(1)[0][0] == torch.bfloat16
    rows = None if any(BATCH in axes.values() for axes in signature.inputs.values()) else 1
    reached = _reached(signature.program, model, names)
    return Graph(proto, parameters, reached, bfloat16, signature.sizes, rows)


# The two signatures


def plain_signature(model: PreTrainedModel, task: Task) -> Signature:
    """The inputs of a task to its outputs; of one row where the model's code fixes the number of rows.

    LLaVA makes a list of its images, and a classifier without a padding token takes one row.

    Raises:
        SppFxError: the model cannot be traced.
    """
    entries = task.inputs(model)
    try:
        return _signature(model, task, entries, AXES)
    except SppFxError as error:
        try:
            return _signature(model, task, entries, {axis: AXES[axis] for axis in AXES if axis != ROWS})
        except SppFxError:
            if "Constraints violated" not in str(error):
                raise error from error.__cause__
            raise SppFxError(
                f"{type(model).__name__} has no ONNX form: its code fixes a size of its inputs when it is traced, as "
                "a loop over the tokens does, so that a graph would hold for that size only"
            ) from error


def _signature(
    model: PreTrainedModel, task: Task, entries: tuple[Input, ...], dynamic: Mapping[str, str]
) -> Signature:
    """`plain_signature` with the axes that stay dynamic, and their names; there is one row if rows do not."""
    names = dict(dynamic)
    if any(TARGET in each.axes for each in entries):
        names[LENGTH] = ENCODER_SEQUENCE
    inputs = {
        each.name: {n: names[str(axis)] for n, axis in enumerate(each.axes) if axis in names}
        for each in entries
    }
    outputs = {
        name: {n: names[axis] for n, axis in enumerate(axes) if axis in names}
        for name, axes in task.outputs.items()
    }
    sizes = SIZES if ROWS in names else SIZES | {ROWS: 1}
    args = tuple(each.filled(sizes, model.dtype, torch.device("cpu")) for each in entries)
    program = export_as(model, forward_of(model, task), args, tuple(map(_dynamic, inputs.values())))
    return Signature(program, args, inputs, outputs, sizes_of(program, entries))


def cached_signature(model: PreTrainedModel) -> Signature:
    """`(input_ids, attention_mask, position_ids, past) -> (logits, present)`.

    `past_key_values.N.key` and `.value` are (batch, heads, past, width), `present.N.*` the same with the new
    tokens behind; past may have length 0. `attention_mask` covers past and new tokens, `position_ids` the new
    ones. A model without positions, or that counts them from the mask, has no input `position_ids`.

    Raises:
        SppFxError: the model cannot be traced, or caches something else than keys and values.
    """
    call = model.forward
    cached = _cache_layers(model)

    def run(
        input_ids: Tensor, attention_mask: Tensor, past: list[list[Tensor]], **positions: Tensor
    ) -> list[Tensor]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        out = call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        layers: Any = cache.layers
        return [out.logits, *(side for layer in layers for side in (layer.keys, layer.values))]

    def run_with_positions(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[list[Tensor]]
    ) -> list[Tensor]:
        return run(input_ids, attention_mask, past, position_ids=position_ids)

    batch, length, before = 2, 8, 5
    new_tokens, all_tokens = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 1: TOTAL}
    past_axes, present_axes = {0: BATCH, 2: PAST}, {0: BATCH, 2: TOTAL}
    inputs: dict[str, Axes] = {"input_ids": new_tokens, "attention_mask": all_tokens}
    args: list[Any] = [
        torch.ones(batch, length, dtype=torch.int64),
        torch.ones(batch, before + length, dtype=torch.int64),
    ]
    counted = takes_positions(model)
    if counted:
        inputs["position_ids"] = new_tokens
        args.append(torch.arange(before, before + length).repeat(batch, 1))
    dynamic: list[Any] = [_dynamic(axes) for axes in inputs.values()]
    outputs: dict[str, Axes] = {"logits": new_tokens}
    for layer in range(len(cached)):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = past_axes
            outputs[f"present.{layer}.{side}"] = present_axes
    args.append(
        [
            [torch.zeros(batch, heads, before, width, dtype=model.dtype) for heads, width in sides]
            for sides in cached
        ]
    )
    dynamic.append([[_dynamic(past_axes), _dynamic(past_axes)] for _ in cached])
    program = export_as(model, run_with_positions if counted else run, tuple(args), tuple(dynamic))
    return Signature(program, tuple(args), inputs, outputs)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model has an input for the positions of its tokens."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def _cache_layers(model: PreTrainedModel) -> list[list[tuple[int, int]]]:
    """Heads and width of the keys and of the values that each layer caches, found by tracing a call.

    Raises:
        SppFxError: a layer caches something else than keys and values, such as a state of fixed size.
    """
    call = model.forward
    kinds: list[str] = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        out = call(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        layers = getattr(getattr(out, "past_key_values", None), "layers", [])
        kinds[:] = [type(layer).__name__ for layer in layers]
        sides = [getattr(layer, side, None) for layer in layers for side in ("keys", "values")]
        found = [side for side in sides if isinstance(side, Tensor) and side.ndim == 4]
        return found if layers and len(found) == len(sides) else [out.logits]

    program, _ = _trace(model, forward)
    unknown = set(kinds) - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if not kinds or unknown:
        what = ", ".join(sorted(unknown)) or "no list of layers"
        raise SppFxError(
            f"{type(model).__name__} keeps {what} while it generates, not keys and values alone: its cache has "
            "no form under Optimum's names; export it without --with-past"
        )
    outputs = program.graph_module.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    shapes = [tuple(node.meta["val"].shape) for node in outputs]  # type: ignore[union-attr]
    sizes = [(int(shape[1]), int(shape[3])) for shape in shapes]
    return [sizes[at : at + 2] for at in range(0, len(sizes), 2)]


def _trace(model: PreTrainedModel, forward: Callable[..., Any]) -> tuple[ExportedProgram, tuple[Any, ...]]:
    """Export a function of input_ids and attention_mask; returns its example arguments too."""
    ids = torch.ones(2, 8, dtype=torch.int64)  # no 0 or 1: torch.export would make those constants
    axes = _dynamic({0: BATCH, 1: SEQUENCE})
    return export_as(model, forward, (ids, torch.ones_like(ids)), (axes, axes)), (ids, ids)


def _dynamic(axes: Axes) -> dict[int, Any]:
    return dict.fromkeys(axes, Dim.DYNAMIC)


# The parameters of a graph


def _first_names(model: PreTrainedModel) -> dict[int, str]:
    """Parameters and persistent buffers: id -> first name."""
    state = model.state_dict(keep_vars=True)
    return {id(tensor): name for name, tensor in reversed(state.items())}


def _reached(program: ExportedProgram, model: PreTrainedModel, names: Mapping[int, str]) -> frozenset[str]:
    """First names of the parameters and persistent buffers that a program's outputs depend on."""
    state = model.state_dict(keep_vars=True)
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = [program.graph.output_node()]
    seen = set(nodes)
    for node in nodes:
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        nodes += new
    found = (inputs[node.name] for node in seen if node.name in inputs)
    return frozenset(names[id(state[name])] for name in found if name in state)


def _name_parameters(graph: ir.Graph, names: Mapping[int, str]) -> set[str]:
    """Give each parameter's initializer its first name and merge those of one parameter; returns the names."""
    kept: dict[str, ir.Value] = {}
    for value in list(graph.initializers.values()):
        name = names.get(id(getattr(value.const_value, "raw", None)))
        if name is None:
            continue
        if name in kept:
            value.replace_all_uses_with(kept[name])
            del graph.initializers[str(value.name)]
            continue
        kept[name] = value
        if value.name != name:
            value.name = name
    return set(kept)


def _take_out_parameters(graph: ir.Graph, names: set[str]) -> tuple[GraphParameter, ...]:
    """Remove the parameters' initializers, so that nothing reads numbers that are not there."""
    found: list[GraphParameter] = []
    for name in [name for name in graph.initializers if name in names]:
        tensor = graph.initializers.pop(name).const_value
        assert tensor is not None
        # onnx_ir types the shape as a protocol; that of a constant has `numpy`.
        shape: tuple[int, ...] = tensor.shape.numpy()  # type: ignore[union-attr]
        found.append(GraphParameter(name, shape, int(tensor.dtype)))
    return tuple(found)


# Translation and simplification


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep stdout clean and the exporter's warnings about its own internals out of the log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    loggers.append(logging.getLogger("torch.onnx._internal.exporter._registration"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _translatable(program: ExportedProgram) -> None:
    """Change, in place, what torch.onnx does not take.

    Its decompositions give attention's result other strides than the model saw, so a view of it (T5, Swin) has to be a
    reshape, which is the same in ONNX, or to read a copy (Doge). Of complex numbers, as in rotary embeddings, it knows
    few ops. A graph has no checks, and what only a check reads has no ONNX form.
    """
    for graph in (
        module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)
    ):
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default
            elif node.target is ATTENTION and not node.meta["val"].is_contiguous() and _is_viewed(node):
                with graph.inserting_after(node):
                    kept = graph.call_function(
                        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                kept.meta = dict(node.meta)
                node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
            elif node.target is aten.unsqueeze.default and node.meta["val"].is_complex():
                source, dim = node.args
                with graph.inserting_before(node):
                    real = graph.call_function(aten.view_as_real.default, (source,))
                    wider = graph.call_function(aten.unsqueeze.default, (real, dim if dim >= 0 else dim - 1))
                real.meta = source.meta | {"val": torch.view_as_real(source.meta["val"])}
                wider.meta = node.meta | {"val": torch.view_as_real(node.meta["val"])}
                node.target, node.args = aten.view_as_complex.default, (wider,)
            elif node.target in _CHECKS:
                graph.erase_node(node)
        graph.eliminate_dead_code()


def _is_viewed(node: fx.Node) -> bool:
    """Whether a view reads a value or a transpose of it, without a copy between them."""
    return any(user.target in VIEWS or (user.target in STRIDED and _is_viewed(user)) for user in node.users)


_CHECKS = (
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX forms of operators that torch.onnx has none for, such as the grouped matmul of fused experts."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        aten._grouped_mm.default: _grouped_mm,
        torch.ops.prims.erf_inv.default: _erf_inv,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        table[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_mm
    return table


def _grouped_mm(rows: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows sorted by expert times each expert's matrix, unrolled over the experts.

    rows (S, in), weight (E, in, out), offs (E,): the end of each expert's rows. Rows past the last end are
    zero in the result, as in transformers' own loop.
    """
    if offs is None or bias is not None or out_dtype is not None or len(rows.shape) != 2:
        raise SppFxError("this form of aten._grouped_mm has no ONNX translation")
    op: Any = opset18  # its signatures are typed for concrete tensors, not for values of a graph
    axis = op.Constant(value_ints=[0])
    ends = op.Cast(offs, to=onnx.TensorProto.INT64)
    start = axis
    parts: list[Any] = []
    for expert in range(int(weight.shape[0])):
        end = op.Gather(ends, op.Constant(value_ints=[expert]), axis=0)
        matrix = op.Gather(weight, op.Constant(value_int=expert), axis=0)
        parts.append(op.MatMul(op.Slice(rows, start, end, axis), matrix))
        start = end
    width = op.Shape(weight, start=2)
    rest = op.Sub(op.Shape(rows, end=1), start)
    zero = op.CastLike(op.Constant(value_float=0.0), rows)
    parts.append(op.Expand(zero, op.Concat(rest, width, axis=0)))
    return op.Concat(*parts, axis=0)


def _erf_inv(x: Any) -> Any:
    """The inverse of erf for -1 < x < 1: Winitzki's formula (2008), and two steps of Newton's method."""
    op: Any = opset18
    a = 0.147

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), x)

    log = op.Log(op.Sub(number(1.0), op.Mul(x, x)))
    half = op.Add(op.Mul(log, number(0.5)), number(2 / (math.pi * a)))
    root = op.Sqrt(op.Sub(op.Mul(half, half), op.Mul(log, number(1 / a))))
    y = op.Mul(op.Sign(x), op.Sqrt(op.Sub(root, half)))
    for _ in range(2):
        slope = op.Mul(op.Exp(op.Neg(op.Mul(y, y))), number(2 / math.sqrt(math.pi)))
        y = op.Sub(y, op.Div(op.Sub(op.Erf(y), x), slope))
    return y


def _simplify(model: ir.Model, parameters: set[str]) -> None:
    """Fold shape arithmetic and repeated nodes, but no node that reads a weight or buffer."""
    pinned = parameters | set(model.graph.initializers)

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in pinned for value in node.inputs) else None

    common_passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, should_fold=should_fold)
        common_passes.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedFunctionsPass(),
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )(model)


def _name_axes(graph: ir.Graph, signature: Signature) -> None:
    """Name the dynamic dimensions; equal dimensions have one name, also further ones of outputs."""
    known: dict[str | int | None, str] = {}
    inputs = [(value, signature.inputs[str(value.name)]) for value in graph.inputs]
    outputs = [(value, signature.outputs[str(value.name)]) for value in graph.outputs]
    for value, axes in [*inputs, *outputs]:
        shape = value.shape
        if shape is None or any(isinstance(shape[axis], int) for axis in axes):
            raise SppFxError(
                f"{value.name} came out as {shape}: {' and '.join(axes.values())} must stay dynamic, "
                "but the model's code fixes one of them"
            )
        dims = [size if isinstance(size, int) else size.value for size in shape]
        known |= {dims[axis]: name for axis, name in axes.items()}
        value.shape = ir.Shape([axes.get(axis, known.get(size, size)) for axis, size in enumerate(dims)])


def _strip(model: onnx.ModelProto) -> None:
    """Remove what ties the file to one run: stack traces, tool names, the tracer's symbol names."""
    model.producer_name, model.producer_version = "spp-fx", ""
    del model.metadata_props[:]
    for graph in all_graphs(model.graph):
        del graph.metadata_props[:], graph.value_info[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    graph = model.graph
    graph.name, graph.doc_string = "main", ""
    for entry in [*graph.input, *graph.output, *graph.initializer]:
        del entry.metadata_props[:]
        entry.doc_string = ""
