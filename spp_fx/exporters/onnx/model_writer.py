"""Writing a whole model as one ONNX graph, in the memory of a few tensors.

onnxruntime opens the graph, with its weights as inputs, before anything is written. Then the parameters are read
from the model folder and written one by one. The written file is read back by a parser of
its own (`graph_weights`) and compared with the model bit for bit. That of a small model is also run, and its outputs
are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from spp_fx.errors import MaskError, SppFxError, UsageError
from spp_fx.exporters.format import ROUNDED, Say, Source, Tick
from spp_fx.exporters.manifest import Part, TensorRecord, site_sizes
from spp_fx.exporters.onnx import OnnxFormat
from spp_fx.exporters.onnx.encodings import Encoded, Encoding, SparseInitializers
from spp_fx.exporters.onnx.graph_export import ENCODER_SEQUENCE, SEQUENCE, build_graph, takes_positions
from spp_fx.exporters.onnx.graph_parameters import Graph, GraphParameter, GraphParameters, find_parameters
from spp_fx.exporters.onnx.graph_weights import GRAPH, GraphWeights
from spp_fx.exporters.onnx.graph_writer import graph_writer, prepend, tensor_bytes
from spp_fx.exporters.onnx.onnxruntime_check import (
    check_standard,
    compare_outputs,
    compute_in_float32,
    reference_of,
    why_not_opened,
    widen,
)
from spp_fx.exporters.onnx.random_inputs import ImageTokens, draw_batches
from spp_fx.exporters.read_back import lost_signs
from spp_fx.graph.model import check_task, hollow_model, load_model
from spp_fx.graph.task import CAUSAL_LM, Task, find_task, positions_of, task_of_model
from spp_fx.storage.safetensors import dtype_name, torch_dtype

COMPARED_BELOW = 10**9
"""Bytes of a model whose outputs are compared by default: it is in memory twice while they are."""

NO_BFLOAT16 = "onnxruntime has no bfloat16 on a CPU"


@dataclass(frozen=True)
class _Export:
    """One export; `unencoded` are the parameters with sites that stay dense, and why."""

    format: OnnxFormat
    source: Source
    graph: Graph
    parameters: GraphParameters
    encoding: Encoding
    unencoded: dict[str, str]
    task: Task

    def encodes(self, parameter: GraphParameter) -> bool:
        return bool(parameter.entries) and parameter.name not in self.unencoded


def write_model(format: OnnxFormat, source: Source, target: Path, tick: Tick, say: Say) -> dict[str, Any]:
    """Fill an empty folder; see `Format.write`."""
    path, chosen = source.folder.path, None if format.task is None else find_task(format.task)
    if chosen is None:
        check_task(path, f"an export to {format.name}")
    model = hollow_model(
        path, dtype=_dtype(source), task=chosen, trust_remote_code=source.trust_remote_code
    ).eval()
    task = chosen or task_of_model(model)
    if not task.takes(model):
        raise UsageError(f"{path}: {type(model).__name__} cannot be run for {task.name} ({task.auto})")
    if format.with_past and task.name != CAUSAL_LM:
        raise UsageError(
            f"{path}: --with-past is for {CAUSAL_LM}: the graph of a model for {task.name} takes whole inputs, and "
            "keeps no cache of them; export it without --with-past"
        )
    graph = build_graph(model, task=task, with_past=format.with_past)
    if not graph.bfloat16:
        compute_in_float32(graph.proto, [parameter.value_info for parameter in graph.parameters])
    parameters = find_parameters(source, model, graph)
    encoding = format.encoding()
    reasons = {each.name: encoding.why_dense(each) for each in parameters.sparse}
    unencoded = {each: reason for each, reason in reasons.items() if reason is not None}
    export = _Export(format, source, graph, parameters, encoding, unencoded, task)
    twin = _runs_as_twin(export)
    for line in [*_announce(export, twin), *parameters.left_out]:
        say(line)
    encoded = _write_graph(export, target, tick)
    source.copy_small_files(target)
    _write_manifest(export, target, encoded)
    checks: dict[str, Any] = {"weights_equal": _compare_weights(export, target, encoded)}
    if isinstance(encoding, SparseInitializers):
        checks["standard_checker"] = "not run: it takes int64 indices only"
        if encoding.indices == "int64":
            check_standard(target / GRAPH)
            checks["standard_checker"] = "passed"
    return checks | _compare_logits(export, target, twin)


def _dtype(source: Source) -> torch.dtype | None:
    """The dtype of the model: the one that `runtime.load` and from_pretrained(dtype="auto") choose."""
    config = source.folder.config
    if source.rounded_to is not None or config.get("dtype", config.get("torch_dtype")):
        return source.rounded_to
    infos = (source.folder.info(name)[1] for name in source.folder.names)
    return next((torch_dtype(info.dtype) for info in infos if info.dtype in ROUNDED), None)


def _runs_as_twin(export: _Export) -> bool:
    """Whether onnxruntime on a CPU runs only the graph's float32 twin, as with bfloat16 models.

    Raises:
        SppFxError: it runs neither; names the operator.
    """
    outline = _outline(export)
    reason = why_not_opened(outline)
    if reason is None:
        return False
    if export.graph.bfloat16:
        widen(outline.graph)
        reason = why_not_opened(outline)
        if reason is None:
            return True
    raise SppFxError(
        f"{export.source.folder.path}: onnxruntime cannot run the model's graph on a CPU, so nothing is written: "
        f"{reason}; try another --dtype, or a format that is not ONNX"
    )


def _outline(export: _Export) -> onnx.ModelProto:
    """The graph to be written, with the numbers of its parameters as inputs."""
    outline = onnx.ModelProto()
    outline.CopyFrom(export.graph.proto)
    nodes: list[onnx.NodeProto] = []
    for parameter in export.parameters.all:
        if export.encodes(parameter):
            inputs, unpacking = export.encoding.outline(parameter)
            outline.graph.input.extend(inputs)
            nodes += unpacking
        else:
            outline.graph.input.append(parameter.value_info)
    outline.graph.initializer.extend(export.encoding.constants())
    prepend(outline.graph, nodes)
    return outline


def _announce(export: _Export, twin: bool) -> Iterator[str]:
    """What the user should know before anything is written: weights that grow, and how they change."""
    sparse, source = export.parameters.sparse, export.source
    dense_bytes = now = grown = 0
    dtypes: set[tuple[str, str]] = set()
    for parameter in sparse:
        before = parameter.nbytes
        after = export.encoding.size(parameter) if export.encodes(parameter) else before
        dense_bytes, now, grown = dense_bytes + before, now + after, grown + (after > before)
        own = dtype_name(parameter.torch_dtype)
        dtypes |= {(source.dtype(entry.name), own) for entry, _ in parameter.entries}
    if grown:
        share = f"{abs(now / max(1, dense_bytes) - 1):.0%} {'LARGER' if now > dense_bytes else 'smaller'}"
        most = "take" if all(each.whole for each in sparse) else "take at most"
        line = f"{export.format.name}: the sparse weights {most} {now / 1e6:.2f} MB where dense they take"
        grow = f"{grown} of {len(sparse)} weights grow; onnx-packed does not"
        yield f"{line} {dense_bytes / 1e6:.2f}, {share} ({grow})"
    if len(export.unencoded) == len(sparse):
        yield f"warning: {export.format.name} can take no weight: all of them stay dense"
    for stored, own in sorted(dtypes):
        if stored != own:
            yield f"config.json has the model in {own}: weights stored as {stored} are rounded to it"
    if rows := export.graph.rows:
        yield (
            f"warning: the graph takes {rows} row at a time (batch_size), for the model's code does not run on several "
            "without knowing how many"
        )
    if twin:
        yield "warning: onnxruntime has no bfloat16 on a CPU, there the graph does not run; --dtype float16 does"


def _write_graph(export: _Export, target: Path, tick: Tick) -> dict[str, Encoded]:
    """Write the graph with all of its numbers; returns how each parameter with sites is encoded."""
    proto = export.graph.proto
    encoded: dict[str, Encoded] = {}
    with graph_writer(proto, target / GRAPH) as writer:
        for parameter in export.parameters.all:
            name, weight = parameter.name, export.parameters.read(parameter)
            if export.encodes(parameter):
                done = export.encoding.encode(parameter, weight, writer)
            else:
                done = Encoded("dense", writer.add(name, weight), export.unencoded.get(name))
            if parameter.entries:
                encoded[name] = done
            tick(name, weight.nbytes)
            del weight  # before the next one is read
        proto.graph.initializer.extend(export.encoding.constants())
    return encoded


def _write_manifest(export: _Export, target: Path, encoded: dict[str, Encoded]) -> None:
    source, sparse = export.source, export.parameters.sparse
    records: dict[str, TensorRecord] = {}
    for parameter in sparse:
        done = encoded[parameter.name]
        for entry, part in parameter.entries:
            part = part.model_copy(update={"swapped": done.swapped})
            records[entry.name] = TensorRecord(
                name=entry.name,
                shape=list(entry.shape),
                dtype=dtype_name(parameter.torch_dtype),
                layout=done.layout,
                reason=done.reason,
                transposed=entry.transposed,
                negative_zeros=done.negative_zeros,  # of the whole parameter
                details={"nnz": entry.nnz} | done.details,
                part=None if part == Part(initializer=entry.name) else part,
            )
    dense_bytes = sum(parameter.nbytes for parameter in sparse)
    shared = sum(tensor_bytes(tensor) for tensor in export.encoding.constants())
    sites_bytes = sum(done.nbytes for done in encoded.values()) + shared
    requirements: dict[str, int | str] = {
        "task": export.task.name,
        "with_past": "yes" if export.format.with_past else "no",
    }
    if isinstance(export.encoding, SparseInitializers):
        requirements["indices"] = export.encoding.indices
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in export.graph.proto.graph.input
    }
    fixed = {name: sizes for name, sizes in axes.items() if any(isinstance(size, int) for size in sizes)}
    if not export.format.with_past:
        requirements |= {name: f"({', '.join(map(str, sizes))})" for name, sizes in fixed.items()}
    lengths = {SEQUENCE, ENCODER_SEQUENCE}
    if export.graph.sizes.conditions and any(lengths.intersection(sizes) for sizes in axes.values()):
        requirements["lengths"] = export.graph.sizes.described(batch=export.graph.rows or 2)
    source.finish(
        target,
        export.format.name,
        [records[entry.name] for entry in source.lock.sites],
        requirements=requirements,
        sizes=site_sizes(dense_bytes, sites_bytes, target.glob(f"{GRAPH}*")),
    )


def _compare_weights(export: _Export, target: Path, encoded: dict[str, Encoded]) -> int:
    """Compare every parameter, as read from the files just written, with the model's; returns their number.

    Raises:
        MaskError: one differs by more than the signs of zeros that could not be kept.
    """
    written = GraphWeights(target / GRAPH)
    for parameter in export.parameters.all:
        done = encoded.get(parameter.name)
        found = written.read(parameter.name)
        if done is not None and done.swapped:
            found = found.transpose(-1, -2)
        lost = lost_signs(found, export.parameters.read(parameter))
        if lost != (done.negative_zeros if done else 0):
            raise MaskError(f"{parameter.name}: decoded from the export, it is not the model's weight")
    return len(export.parameters.all)


def _compare_logits(export: _Export, target: Path, twin: bool) -> dict[str, Any]:
    wanted = export.format.compare_logits
    size = export.source.folder.stored_bytes
    unrun = f"not run: {NO_BFLOAT16}" if twin else "not run: its graph was opened without the weights"
    if wanted is False:
        return {"logits": "not compared: not asked for", "shipped_file": unrun}
    if wanted is None and size >= COMPARED_BELOW:
        reason = f"the model takes {size / 1e9:.1f} GB; --compare-logits does"
        return {"logits": f"not compared: {reason}", "shipped_file": unrun}
    source, task = export.source, export.task
    dtype = source.rounded_to or "auto"
    real = load_model(
        source.folder.path, dtype=dtype, task=task, trust_remote_code=source.trust_remote_code
    ).eval()
    entries = task.inputs(real)
    found = compare_outputs(
        target / GRAPH,
        reference_of(real, task, count_positions=export.format.with_past and takes_positions(real)),
        draw_batches(
            entries,
            real.dtype,
            max_length=positions_of(real),
            sizes=export.graph.sizes,
            images=ImageTokens.of(real, entries),
        ),
        task.outputs,
        vocabulary=getattr(real.config.get_text_config(decoder=True), "vocab_size", None),
        twin=twin,
    )
    agreement = found.argmax_agreement
    return {
        "shipped_file": unrun if twin else "run",
        "computed_in": f"{found.computed_in} twin; {NO_BFLOAT16}" if twin else found.computed_in,
        "max_abs_difference": found.max_abs_difference,
        "allowed_difference": found.tolerance * found.spread,
    } | ({} if agreement is None else {"argmax_agreement": agreement})
