"""A whole causal language model as one ONNX graph, its weights still under the checkpoint's names.

The exporter's own optimizer folds `Transpose(weight)` into new constants, merges equal weights and
renames them; what is left can no longer be matched to a checkpoint or a mask. Here the graph is exported
as it stands and then simplified with every weight pinned: each parameter that the logits depend on stays
one initializer, named and oriented as in the checkpoint; tied parameters share the one of the first name.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import opset18, optimizer
from torch import Tensor, nn

from spp_fx.errors import SppFxError

INPUT_NAMES = ("input_ids", "attention_mask")
OUTPUT_NAME = "logits"

_EXAMPLE_SHAPE = (2, 8)  # no 0 or 1: the tracer would make those constants


@dataclass(frozen=True)
class WeightLocation:
    """Where a parameter lives in an ONNX graph.

    Args:
        initializer: name of the initializer; of a tied parameter, the name of the first one.
        transposed: True if the initializer holds the parameter with its last two dimensions swapped.
    """

    initializer: str
    transposed: bool


class _Logits(nn.Module):
    """Gives the exporter a forward that takes two tensors and returns one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Any = self.module(input_ids=input_ids, attention_mask=attention_mask)
        return out if isinstance(out, Tensor) else out.logits


def build_onnx(module: nn.Module, *, opset: int = 18) -> onnx.ModelProto:
    """Export `module(input_ids, attention_mask)` with a dynamic batch and sequence length.

    Args:
        module: takes input_ids and attention_mask, both (batch, sequence) int64, as keywords, and returns
            the logits (batch, sequence, vocabulary) or an object with them as `.logits`. In eval mode, on
            any device that holds real numbers. fp32, fp16 or bf16.
        opset: ONNX operator set, 18 or later.

    Returns:
        A model with all weights inside (it may be over the 2 GiB that one protobuf file can hold: write it
        with `onnx_sparse.save`). Initializers are the parameters and buffers under their own names,
        untransposed, plus the exporter's small constants (shapes, axes). A parameter that the logits do not
        depend on is left out. No stack traces or file names of the exporting machine are kept.

    Raises:
        SppFxError: the module is in training mode or has weights on the meta device, an operator has no
            ONNX form, a dimension would come out fixed, or a weight did not survive the export as it is.
    """
    _check_exportable(module, opset)
    inputs = tuple(torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64, device=_device(module)) for _ in INPUT_NAMES)
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in INPUT_NAMES}
    with _quiet():
        try:
            with torch.no_grad():
                exported = torch.export.export(_Logits(module), inputs, dynamic_shapes=dynamic, strict=False)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise SppFxError(f"the model cannot be traced for ONNX: {_first_line(error)}") from error
        try:
            program = torch.onnx.export(
                exported,
                inputs,
                dynamo=True,
                optimize=False,
                external_data=False,
                verbose=False,
                opset_version=opset,
                input_names=INPUT_NAMES,
                output_names=[OUTPUT_NAME],
                custom_translation_table=_translations(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise SppFxError(f"the model has no ONNX form: {_innermost(error)}") from error
        assert program is not None
        graph_model = program.model
        _restore_names(graph_model.graph, module)
        _simplify(graph_model)
        _name_axes(graph_model.graph)
        model = ir.to_proto(graph_model)
    _strip(model)
    _check_weights(model, module)
    return model


def locate(model: onnx.ModelProto, module: nn.Module) -> dict[str, WeightLocation]:
    """Find the initializer that holds each parameter, by name first, then by its bytes.

    Returns:
        Parameter name (every name of a tied parameter) -> location. A parameter whose bytes are no
        initializer, neither as stored nor transposed, is absent.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, WeightLocation] = {}
    by_tensor: dict[int, WeightLocation] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        location = by_tensor.get(id(parameter))
        if location is None:
            location = _locate_one(name, parameter, initializers)
        if location is not None:
            by_tensor[id(parameter)] = location
            found[name] = location
    return found


def _locate_one(
    name: str, parameter: Tensor, initializers: dict[str, onnx.TensorProto]
) -> WeightLocation | None:
    stored = _bytes(parameter)
    swapped: bytes | None = None
    swapped_dims = [*parameter.shape[:-2], *parameter.shape[:-3:-1]]
    if name in initializers:
        candidates = [initializers[name]]
    else:  # short vectors are often equal (all ones, all zeros): their bytes identify nothing
        candidates = list(initializers.values()) if parameter.ndim >= 2 else []
    for tensor in candidates:
        dims = list(tensor.dims)
        if dims == list(parameter.shape) and _payload(tensor) == stored:
            return WeightLocation(tensor.name, transposed=False)
        if parameter.ndim >= 2 and dims == swapped_dims and len(_payload(tensor)) == len(stored):
            swapped = swapped if swapped is not None else _bytes(parameter.transpose(-1, -2))
            if _payload(tensor) == swapped:
                return WeightLocation(tensor.name, transposed=True)
    return None


def _payload(tensor: onnx.TensorProto) -> bytes:
    return tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_exportable(module: nn.Module, opset: int) -> None:
    if opset < 18:
        raise SppFxError(f"opset {opset} is too old for this export, 18 is the first that works")
    if module.training:
        raise SppFxError("the model is in training mode: dropout would be exported; call eval() first")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise SppFxError(f"{name} is on the meta device and has no numbers to export: load the weights")


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


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


def _restore_names(graph: ir.Graph, module: nn.Module) -> None:
    """Give initializers the names `module` knows them by; a tied one is kept once, under its first name."""
    prefix = "module."
    first: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(tensor), name)
    canonical = {name: first[id(tensor)] for name, tensor in module.named_parameters(remove_duplicate=False)}
    kept: dict[str, ir.Value] = {}
    for value in list(graph.initializers.values()):
        old = str(value.name).removeprefix(prefix)
        new = canonical.get(old, old)
        if new in kept:
            value.replace_all_uses_with(kept[new])
            del graph.initializers[str(value.name)]
            continue
        kept[new] = value
        if value.name != new:
            value.name = new


def _simplify(model: ir.Model) -> None:
    """Fold shape arithmetic and repeated nodes; a node that reads a weight or buffer is left as it is."""
    pinned = set(model.graph.initializers)

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


def _name_axes(graph: ir.Graph) -> None:
    """Name the dynamic dimensions; the two inputs' batches are one."""
    for value in graph.inputs:
        shape = value.shape
        if shape is None or len(shape) != 2 or any(isinstance(dim, int) for dim in shape):
            raise SppFxError(
                f"{value.name} came out as {shape}: batch and sequence must stay dynamic, "
                "but the model's code fixes one of them"
            )
        value.shape = ir.Shape(["batch", "sequence"])
    (output,) = graph.outputs
    if output.shape is None or len(output.shape) != 3 or any(isinstance(d, int) for d in output.shape[:2]):
        raise SppFxError(f"logits came out as {output.shape}, expected (batch, sequence, vocabulary)")
    output.shape = ir.Shape(["batch", "sequence", output.shape[2]])


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


def _check_weights(model: onnx.ModelProto, module: nn.Module) -> None:
    """Every parameter in the graph is there under its name, byte for byte and untransposed."""
    used = {name for node in model.graph.node for name in node.input}
    initializers = {tensor.name for tensor in model.graph.initializer}
    locations = locate(model, module)
    for name, _ in module.named_parameters():
        location = locations.get(name)
        if location == WeightLocation(name, transposed=False):
            continue
        if name not in initializers and name not in used and location is None:
            continue  # nothing in the graph reads it
        raise SppFxError(f"{name}: the ONNX exporter changed this weight instead of keeping it as it is")
