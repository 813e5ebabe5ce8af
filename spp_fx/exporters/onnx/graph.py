"""A whole causal language model as one ONNX graph without its weights, which are named as in the checkpoint.

The exporter's own optimizer folds `Transpose(weight)` into new constants, merges equal weights and
renames them; what is left can no longer be matched to a checkpoint or a mask. Here the graph is exported
as it stands and then simplified with every weight pinned: each parameter that the outputs depend on stays
one initializer, named and oriented as in the model; tied parameters share the one of the first name. The
numbers never pass through here, so that a model larger than the memory can be exported: whoever writes the
file puts them beside the graph, one by one.
"""

import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import opset18, optimizer
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.bfloat16 import compute_in_float32
from spp_fx.exporters.onnx.trace import Axes, Signature, cached_signature, plain_signature

OPSET = 18


@dataclass(frozen=True)
class GraphParameter:
    """A parameter or stored buffer that the graph reads.

    Attributes:
        name: its first name in the model, and its name in the graph.
        shape: as the model has it.
        dtype: ONNX data type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int

    @property
    def value_info(self) -> onnx.ValueInfoProto:
        """The parameter as an input of a graph."""
        return onnx.helper.make_tensor_value_info(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph and the parameters that are still to be put into it.

    Attributes:
        proto: the model with the exporter's small constants (shapes, axes, computed buffers) and none of its
            parameters. No stack traces or file names of the exporting machine are kept.
        parameters: what is missing, in the graph's order.
        reached: names of the parameters and stored buffers that the outputs depend on, as torch.export has it:
            those of `parameters`, unless the exporter lost one.
        bfloat16: whether the model computes in bfloat16; where another only rounds to it here and there, the
            graph does so by casts, for onnxruntime's sake.
    """

    proto: onnx.ModelProto
    parameters: tuple[GraphParameter, ...]
    reached: frozenset[str]
    bfloat16: bool


def build_graph(model: PreTrainedModel, *, with_past: bool = False) -> Graph:
    """Export a model with a dynamic batch and sequence length.

    Args:
        model: a causal language model in eval mode on the CPU, float32, float16 or bfloat16; its parameters
            are never read (see `ir.model.hollow_model`), its buffers are real.
        with_past: with a key/value cache, see `trace.cached_signature`.

    Raises:
        SppFxError: the model is in training mode, cannot be traced, an operator has no ONNX form, or a
            dimension would come out fixed.
    """
    if model.training:
        raise SppFxError("the model is in training mode: dropout would be exported; call eval() first")
    with _quiet():
        signature = (cached_signature if with_past else plain_signature)(model)
        reached = _reached(signature.program, model)
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
            raise SppFxError(f"the model has no ONNX form: {_innermost(error)}") from error
        assert program is not None
        graph_model = program.model
        _simplify(graph_model, _name_parameters(graph_model.graph, model))
        _name_axes(graph_model.graph, signature)
        parameters = _take_out(graph_model.graph, model)
        proto = ir.to_proto(graph_model)
    _strip(proto)
    names = {parameter.name for parameter in parameters}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    bfloat16 = _main_dtype(model) == torch.bfloat16
    if not bfloat16:
        compute_in_float32(proto, [parameter.value_info for parameter in parameters])
    return Graph(proto, parameters, reached, bfloat16)


def _main_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that most of a model's weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _reached(program: ExportedProgram, model: PreTrainedModel) -> frozenset[str]:
    """First names of the parameters and stored buffers that a program's outputs depend on."""
    names, state = _tensors(model), model.state_dict(keep_vars=True)
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


def _tensors(model: PreTrainedModel) -> dict[int, str]:
    """Parameters and stored buffers: id -> first name."""
    stored = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), name)
    for name, tensor in model.named_buffers(remove_duplicate=False):
        if name in stored:
            names.setdefault(id(tensor), name)
    return names


def _name_parameters(graph: ir.Graph, model: PreTrainedModel) -> set[str]:
    """Give each parameter's initializer its first name, once where it has several; returns those names."""
    names = _tensors(model)
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


def _take_out(graph: ir.Graph, model: PreTrainedModel) -> tuple[GraphParameter, ...]:
    """Replace each parameter's numbers by a promise of them, so that nothing reads what is not there."""
    names = _tensors(model)
    found: list[GraphParameter] = []
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or id(getattr(tensor, "raw", None)) not in names:
            continue
        shape: tuple[int, ...] = tensor.shape.numpy()  # type: ignore[union-attr]
        found.append(GraphParameter(str(value.name), shape, int(tensor.dtype)))
        value.const_value = ir.ExternalTensor(
            "promised", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(shape), name=str(value.name)
        )
    return tuple(found)


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX forms of operators that torch.onnx has none for: the grouped matmul of fused experts."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: _grouped_mm}
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


def _simplify(model: ir.Model, parameters: set[str]) -> None:
    """Fold shape arithmetic and repeated nodes; a node that reads a weight or buffer is left as it is."""
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
    """Name the dynamic dimensions; those that stand for the same number have one name."""
    for value in graph.inputs:
        _name(value, signature.inputs[str(value.name)])
    for value in graph.outputs:
        _name(value, signature.outputs[str(value.name)])


def _name(value: ir.Value, axes: Axes) -> None:
    shape = value.shape
    if shape is None or any(isinstance(shape[axis], int) for axis in axes):
        raise SppFxError(
            f"{value.name} came out as {shape}: {' and '.join(axes.values())} must stay dynamic, "
            "but the model's code fixes one of them"
        )
    value.shape = ir.Shape([axes.get(axis, size) for axis, size in enumerate(shape)])


def _strip(model: onnx.ModelProto) -> None:
    """Drop what ties the file to one run: stack traces, tool names, the tracer's symbol names."""
    model.producer_name, model.producer_version = "spp-fx", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name = "main"
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    nodes = list(graph.node)
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                del attribute.g.metadata_props[:]
                del attribute.g.value_info[:]
                nodes.extend(attribute.g.node)
    for entry in [*graph.input, *graph.output, *graph.initializer]:
        del entry.metadata_props[:]
        entry.doc_string = ""
