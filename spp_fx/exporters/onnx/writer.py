"""Writing a whole model as one ONNX graph, in the memory of a few tensors.

The graph is made of a model without weights; then parameter after parameter is read from the model folder,
put into the form that the format has for it, and appended to the data file. Before that, onnxruntime opens the
graph with its weights as inputs: a file that it cannot run is not written. Everything is read back and held to
the model bit for bit, by code that shares nothing with the writer. Where the model is small, the file is run as
well and its logits are compared.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from spp_fx.errors import MaskError, SppFxError
from spp_fx.exporters.checks import lost_signs
from spp_fx.exporters.format import ROUNDED, ExportSettings, Say, Source, Tick
from spp_fx.exporters.manifest import Part, TensorRecord, site_sizes
from spp_fx.exporters.onnx.bfloat16 import widen
from spp_fx.exporters.onnx.check import check_standard, compare_logits, logits_of, why_not_opened
from spp_fx.exporters.onnx.data import DataFile, save, tensor_bytes
from spp_fx.exporters.onnx.encoding import Encoded, Encoding, dense
from spp_fx.exporters.onnx.graph import Graph, GraphParameter, build_graph
from spp_fx.exporters.onnx.parameters import GraphParameters, SparseParameter, dtype_of, find_parameters
from spp_fx.exporters.onnx.trace import takes_positions
from spp_fx.exporters.onnx.weights import GRAPH, GraphWeights
from spp_fx.graph.model import check_causal, hollow_model, load_model
from spp_fx.storage.safetensors import dtype_name, torch_dtype

COMPARED_BELOW = 10**9
"""Bytes of a model whose logits are compared by default: it is in memory twice while they are."""

NO_BFLOAT16 = "onnxruntime has no bfloat16 on a CPU"

MakeEncoding = Callable[[ExportSettings, onnx.ModelProto], Encoding]


@dataclass(frozen=True)
class _Export:
    """What one export is about."""

    format: str
    source: Source
    settings: ExportSettings
    graph: Graph
    parameters: GraphParameters
    encoding: Encoding


def writer(name: str, make: MakeEncoding) -> Callable[..., dict[str, Any]]:
    """The `write` of a format: what `make` gives for the settings and the graph puts the weights into it."""

    def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
        check_causal(source.folder.path, f"an export to {name}")
        model = hollow_model(
            source.folder.path, dtype=_dtype(source), trust_remote_code=source.trust_remote_code
        ).eval()
        graph = build_graph(model, with_past=settings.with_past)
        parameters = find_parameters(source, model, graph)
        export = _Export(name, source, settings, graph, parameters, make(settings, graph.proto))
        twin = _runs_as_twin(export)
        for line in [*_announce(export, twin), *parameters.left_out]:
            say(line)
        encoded = _write_graph(export, target, tick)
        source.copy_small_files(target)
        _finish(export, target, encoded)
        checks: dict[str, Any] = {"weights_equal": _compare_weights(export, target, encoded)}
        if name == "onnx":
            checks["standard_checker"] = _standard(target, settings)
        return checks | _compare_logits(export, target, twin)

    return write


def _dtype(source: Source) -> torch.dtype | None:
    """What the model is made in: as `runtime.load` and from_pretrained(dtype="auto") have it."""
    if source.rounded_to is not None or source.folder.config.get(
        "dtype", source.folder.config.get("torch_dtype")
    ):
        return source.rounded_to
    infos = (source.folder.info(name)[1] for name in source.folder.names)
    return next((torch_dtype(info.dtype) for info in infos if info.dtype in ROUNDED), None)


def _runs_as_twin(export: _Export) -> bool:
    """Whether onnxruntime on a CPU runs the graph as its float32 twin only, as it does with bfloat16 models.

    Raises:
        SppFxError: it runs neither; names the operator.
    """
    outline = _outline(export)
    reason = why_not_opened(outline)
    if reason is None:
        return False
    if export.graph.bfloat16:
        widen(outline)
        reason = why_not_opened(outline)
        if reason is None:
            return True
    raise SppFxError(
        f"{export.source.folder.path}: onnxruntime cannot run the model's graph on a CPU, so nothing is written: "
        f"{reason}; try another --dtype, or a format that is not ONNX"
    )


def _outline(export: _Export) -> onnx.ModelProto:
    """The graph that is to be written, the numbers of its parameters as inputs."""
    outline = onnx.ModelProto()
    outline.CopyFrom(export.graph.proto)
    nodes: list[onnx.NodeProto] = []
    for parameter in export.graph.parameters:
        sites = export.parameters.sparse.get(parameter.name)
        if sites is None or export.encoding.refusal(parameter, sites) is not None:
            outline.graph.input.append(parameter.value_info)
            continue
        inputs, unpacking = export.encoding.outline(parameter, sites)
        outline.graph.input.extend(inputs)
        nodes += unpacking
    outline.graph.initializer.extend(export.encoding.constants())
    _put_before(outline.graph, nodes)
    return outline


def _put_before(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *own])


def _announce(export: _Export, twin: bool) -> Iterator[str]:
    """What has to be known before anything is written: what the sites will take, and what they become."""
    dense_bytes = now = grown = refusals = 0
    sparse, source = export.parameters.sparse, export.source
    dtypes: set[tuple[str, str]] = set()
    for parameter in export.graph.parameters:
        if parameter.name in sparse:
            sites = sparse[parameter.name]
            whole = _dense_bytes(parameter)
            refused = export.encoding.refusal(parameter, sites) is not None
            size = whole if refused else export.encoding.size(parameter, sites)
            dense_bytes, now, grown = dense_bytes + whole, now + size, grown + (size > whole)
            refusals += refused
            own = dtype_name(dtype_of(parameter))
            dtypes |= {(source.dtype(entry.name), own) for entry, _ in sites.entries}
    if now != dense_bytes:
        share = f"{abs(now / max(1, dense_bytes) - 1):.0%} {'LARGER' if now > dense_bytes else 'smaller'}"
        most = "take" if all(each.whole for each in sparse.values()) else "take at most"
        line = f"{export.format}: the sparse weights {most} {now / 1e6:.2f} MB where dense they take"
        grow = f" ({grown} of {len(sparse)} weights grow; onnx-packed does not)" if grown else ""
        yield f"{line} {dense_bytes / 1e6:.2f}, {share}{grow}"
    if refusals == len(sparse):
        yield f"warning: {export.format} can take no weight: all of them stay dense"
    for stored, own in sorted(dtypes):
        if stored != own:
            yield f"config.json has the model in {own}: weights stored as {stored} are rounded to it"
    if twin:
        yield "warning: onnxruntime has no bfloat16 on a CPU, there the graph does not run; --dtype float16 does"


def _dense_bytes(parameter: GraphParameter) -> int:
    return math.prod(parameter.shape) * dtype_of(parameter).itemsize


def _write_graph(export: _Export, target: Path, tick: Tick) -> dict[str, Encoded]:
    """Write the graph with all of its numbers; returns how each parameter with sites is held."""
    proto = export.graph.proto
    data_path = target / f"{GRAPH}.data"
    encoded: dict[str, Encoded] = {}
    nodes: list[onnx.NodeProto] = []
    with DataFile(data_path) as data:
        for parameter in export.graph.parameters:
            weight = export.parameters.read(parameter)
            done = _encode(export, parameter, weight, data)
            proto.graph.initializer.extend(done.tensors)
            if done.sparse is not None:
                proto.graph.sparse_initializer.append(done.sparse)
            nodes += done.nodes
            if parameter.name in export.parameters.sparse:
                encoded[parameter.name] = done
            tick(parameter.name, weight.nbytes)
            del weight  # before the next one is read
    proto.graph.initializer.extend(export.encoding.constants())
    _put_before(proto.graph, nodes)
    save(proto, target / GRAPH, data_path)
    return encoded


def _encode(export: _Export, parameter: GraphParameter, weight: Any, data: DataFile) -> Encoded:
    sites = export.parameters.sparse.get(parameter.name)
    if sites is None:
        return dense(parameter, weight, data, None)
    reason = export.encoding.refusal(parameter, sites)
    if reason is not None:
        return dense(parameter, weight, data, reason)
    return export.encoding.encode(parameter, sites, weight, data)


def _finish(export: _Export, target: Path, encoded: dict[str, Encoded]) -> None:
    by_name = {parameter.name: parameter for parameter in export.graph.parameters}
    records = {
        record.name: record
        for name, done in encoded.items()
        for record in _records(export, by_name[name], export.parameters.sparse[name], done)
    }
    dense_bytes = sum(_dense_bytes(by_name[name]) for name in encoded)
    shared = sum(tensor_bytes(tensor) for tensor in export.encoding.constants())
    sites_bytes = sum(done.nbytes for done in encoded.values()) + shared
    requirements: dict[str, int | str] = {"with_past": "yes" if export.settings.with_past else "no"}
    if export.format == "onnx":
        requirements["indices"] = export.settings.indices
    export.source.finish(
        target,
        export.format,
        export.source.lock,
        [records[entry.name] for entry in export.source.lock.sites],
        requirements=requirements,
        sizes=site_sizes(dense_bytes, sites_bytes, target.glob(f"{GRAPH}*")),
    )


def _records(
    export: _Export, parameter: GraphParameter, sites: SparseParameter, done: Encoded
) -> list[TensorRecord]:
    """A record for each site of a parameter; zeros that lost their sign are those of the whole parameter."""
    records: list[TensorRecord] = []
    for entry, part in sites.entries:
        place = part.model_copy(update={"swapped": done.swapped})
        records.append(
            TensorRecord(
                name=entry.name,
                shape=list(entry.shape),
                dtype=dtype_name(dtype_of(parameter)),
                layout=done.layout,
                reason=done.reason,
                transposed=entry.transposed,
                negative_zeros=done.negative_zeros,
                details={"nnz": entry.nnz} | done.details,
                part=None if place == Part(initializer=entry.name) else place,
            )
        )
    return records


def _compare_weights(export: _Export, target: Path, encoded: dict[str, Encoded]) -> int:
    """Hold every parameter, as read from the files just written, to the model's; returns how many were equal.

    Raises:
        MaskError: one differs by more than the signs of zeros that had no place.
    """
    written = GraphWeights.open(target / GRAPH)
    for parameter in export.graph.parameters:
        done = encoded.get(parameter.name)
        found = written.read(parameter.name)
        if done is not None and done.swapped:
            found = found.transpose(-1, -2)
        expected = export.parameters.read(parameter)
        lost = lost_signs(found, expected)
        if lost != (done.negative_zeros if done else 0):
            raise MaskError(f"{parameter.name}: decoded from the export, it is not the model's weight")
    return len(export.graph.parameters)


def _standard(target: Path, settings: ExportSettings) -> str:
    if settings.indices != "int64":
        return "not run: it takes int64 indices only"
    check_standard(target / GRAPH)
    return "passed"


def _compare_logits(export: _Export, target: Path, twin: bool) -> dict[str, Any]:
    wanted = export.settings.compare_logits
    size = export.source.folder.stored_bytes
    unrun = f"not run: {NO_BFLOAT16}" if twin else "not run: its graph was opened without the weights"
    if wanted is False:
        return {"logits": "not compared: not asked for", "shipped_file": unrun}
    if wanted is None and size >= COMPARED_BELOW:
        reason = f"the model takes {size / 1e9:.1f} GB; --compare-logits does"
        return {"logits": f"not compared: {reason}", "shipped_file": unrun}
    source = export.source
    dtype = source.rounded_to or "auto"
    real = load_model(source.folder.path, dtype=dtype, trust_remote_code=source.trust_remote_code).eval()
    text = real.config.get_text_config(decoder=True)
    found = compare_logits(
        target / GRAPH,
        logits_of(real, count_positions=export.settings.with_past and takes_positions(real)),
        text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None),
        twin=twin,
    )
    return {
        "shipped_file": unrun if twin else "run",
        "computed_in": f"{found.computed_in} twin; {NO_BFLOAT16}" if twin else found.computed_in,
        "max_abs_difference": found.max_abs_difference,
        "allowed_difference": found.tolerance * found.spread,
        "argmax_agreement": found.argmax_agreement,
    }
