"""Writing a whole model as one ONNX graph, in the memory of a few tensors.

The graph is exported from a model without weights. Before anything is written, onnxruntime opens it with its
weights as inputs: a graph that it cannot run is an error. Then each parameter is read from the model folder,
encoded as the format wants and appended to the data file. Everything is read back and compared with the model bit
for bit, by code that shares nothing with the writer. A small model's file is run and its logits are compared.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from spp_fx.errors import MaskError, SppFxError
from spp_fx.exporters.format import ROUNDED, Format, RoundTo, Say, Source, Tick
from spp_fx.exporters.manifest import Manifest, Part, TensorRecord, site_sizes
from spp_fx.exporters.onnx.encodings import Encoded, Encoding, SparseInitializers, dense
from spp_fx.exporters.onnx.graph_export import Graph, build_graph, takes_positions
from spp_fx.exporters.onnx.graph_parameters import GraphParameters, find_parameters
from spp_fx.exporters.onnx.graph_weights import GRAPH, GraphWeights, read
from spp_fx.exporters.onnx.onnxruntime_check import (
    check_standard,
    compare_logits,
    compute_in_float32,
    logits_of,
    why_not_opened,
    widen,
)
from spp_fx.exporters.onnx.tensor_data import save, tensor_bytes
from spp_fx.exporters.read_back import lost_signs
from spp_fx.graph.model import check_causal, hollow_model, load_model
from spp_fx.options import option
from spp_fx.sparsity.weights import Weights
from spp_fx.storage.safetensors import dtype_name, torch_dtype

COMPARED_BELOW = 10**9
"""Bytes of a model whose logits are compared by default: it is in memory twice while they are."""

NO_BFLOAT16 = "onnxruntime has no bfloat16 on a CPU"


@dataclass(frozen=True)
class _Export:
    """The parts of one export.

    Attributes:
        unencoded: parameters with sites that stay dense -> why.
    """

    format: "OnnxFormat"
    source: Source
    graph: Graph
    parameters: GraphParameters
    encoding: Encoding
    unencoded: dict[str, str]


@dataclass(frozen=True)
class OnnxFormat(Format):
    """An ONNX format: what it adds is how weights are put into the graph."""

    program = True
    dtype: RoundTo | None = option(None, "Round the weights to this type.")
    with_past: bool = option(False, "ONNX graph with a key/value cache, under Optimum's names.")
    compare_logits: bool | None = option(
        None,
        "Run the written graph and compare its logits with the model's. Default: models below 1 GB.",
    )

    @abstractmethod
    def encoding(self, proto: onnx.ModelProto) -> Encoding:
        """How the weights of a graph are encoded."""

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Weights:
        return read(folder, manifest)

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        check_causal(source.folder.path, f"an export to {self.name}")
        model = hollow_model(
            source.folder.path, dtype=_dtype(source), trust_remote_code=source.trust_remote_code
        ).eval()
        graph = build_graph(model, with_past=self.with_past)
        if not graph.bfloat16:
            compute_in_float32(graph.proto, [parameter.value_info for parameter in graph.parameters])
        parameters = find_parameters(source, model, graph)
        encoding = self.encoding(graph.proto)
        reasons = {each: encoding.why_dense(sites) for each, sites in parameters.sparse.items()}
        unencoded = {each: reason for each, reason in reasons.items() if reason is not None}
        export = _Export(self, source, graph, parameters, encoding, unencoded)
        twin = _runs_as_twin(export)
        for line in [*_announce(export, twin), *parameters.left_out]:
            say(line)
        encoded = _write_graph(export, folder, tick)
        source.copy_small_files(folder)
        _write_manifest(export, folder, encoded)
        checks: dict[str, Any] = {"weights_equal": _compare_weights(export, folder, encoded)}
        if isinstance(encoding, SparseInitializers):
            checks["standard_checker"] = "not run: it takes int64 indices only"
            if encoding.indices == "int64":
                check_standard(folder / GRAPH)
                checks["standard_checker"] = "passed"
        return checks | _compare_logits(export, folder, twin)


def _dtype(source: Source) -> torch.dtype | None:
    """The dtype of the model: the one that `runtime.load` and from_pretrained(dtype="auto") choose."""
    config = source.folder.config
    if source.rounded_to is not None or config.get("dtype", config.get("torch_dtype")):
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
        widen(outline.graph)
        reason = why_not_opened(outline)
        if reason is None:
            return True
    raise SppFxError(
        f"{export.source.folder.path}: onnxruntime cannot run the model's graph on a CPU, so nothing is written: "
        f"{reason}; try another --dtype, or a format that is not ONNX"
    )


def _outline(export: _Export) -> onnx.ModelProto:
    """The graph that is to be written, with the numbers of its parameters as inputs."""
    outline = onnx.ModelProto()
    outline.CopyFrom(export.graph.proto)
    nodes: list[onnx.NodeProto] = []
    for parameter in export.graph.parameters:
        sites = export.parameters.sparse.get(parameter.name)
        if sites is None or parameter.name in export.unencoded:
            outline.graph.input.append(parameter.value_info)
            continue
        inputs, unpacking = export.encoding.outline(sites)
        outline.graph.input.extend(inputs)
        nodes += unpacking
    outline.graph.initializer.extend(export.encoding.constants())
    _prepend(outline.graph, nodes)
    return outline


def _prepend(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *own])


def _announce(export: _Export, twin: bool) -> Iterator[str]:
    """What the user has to know before anything is written: the size of the sites, and how they change."""
    sparse, source = export.parameters.sparse, export.source
    dense_bytes = now = grown = 0
    dtypes: set[tuple[str, str]] = set()
    for name, sites in sparse.items():
        before = sites.parameter.nbytes
        after = before if name in export.unencoded else export.encoding.size(sites)
        dense_bytes, now, grown = dense_bytes + before, now + after, grown + (after > before)
        own = dtype_name(sites.parameter.torch_dtype)
        dtypes |= {(source.dtype(entry.name), own) for entry, _ in sites.entries}
    if now != dense_bytes:
        share = f"{abs(now / max(1, dense_bytes) - 1):.0%} {'LARGER' if now > dense_bytes else 'smaller'}"
        most = "take" if all(each.whole for each in sparse.values()) else "take at most"
        line = f"{export.format.name}: the sparse weights {most} {now / 1e6:.2f} MB where dense they take"
        grow = f" ({grown} of {len(sparse)} weights grow; onnx-packed does not)" if grown else ""
        yield f"{line} {dense_bytes / 1e6:.2f}, {share}{grow}"
    if len(export.unencoded) == len(sparse):
        yield f"warning: {export.format.name} can take no weight: all of them stay dense"
    for stored, own in sorted(dtypes):
        if stored != own:
            yield f"config.json has the model in {own}: weights stored as {stored} are rounded to it"
    if twin:
        yield "warning: onnxruntime has no bfloat16 on a CPU, there the graph does not run; --dtype float16 does"


def _write_graph(export: _Export, target: Path, tick: Tick) -> dict[str, Encoded]:
    """Write the graph with all of its numbers; returns how each parameter with sites is encoded."""
    proto, sparse = export.graph.proto, export.parameters.sparse
    data_path = target / f"{GRAPH}.data"
    encoded: dict[str, Encoded] = {}
    nodes: list[onnx.NodeProto] = []
    with data_path.open("xb") as file:
        for parameter in export.graph.parameters:
            name, weight = parameter.name, export.parameters.read(parameter)
            if name not in sparse or name in export.unencoded:
                done = dense(name, weight, file, export.unencoded.get(name))
            else:
                done = export.encoding.encode(sparse[name], weight, file)
            proto.graph.initializer.extend(done.tensors)
            if done.sparse is not None:
                proto.graph.sparse_initializer.append(done.sparse)
            nodes += done.nodes
            if name in sparse:
                encoded[name] = done
            tick(name, weight.nbytes)
            del weight  # before the next one is read
    proto.graph.initializer.extend(export.encoding.constants())
    _prepend(proto.graph, nodes)
    save(proto, target / GRAPH, data_path)
    return encoded


def _write_manifest(export: _Export, target: Path, encoded: dict[str, Encoded]) -> None:
    source, sparse = export.source, export.parameters.sparse
    records: dict[str, TensorRecord] = {}
    for name, done in encoded.items():
        for entry, part in sparse[name].entries:
            part = part.model_copy(update={"swapped": done.swapped})
            records[entry.name] = TensorRecord(
                name=entry.name,
                shape=list(entry.shape),
                dtype=dtype_name(sparse[name].parameter.torch_dtype),
                layout=done.layout,
                reason=done.reason,
                transposed=entry.transposed,
                negative_zeros=done.negative_zeros,  # of the whole parameter
                details={"nnz": entry.nnz} | done.details,
                part=None if part == Part(initializer=entry.name) else part,
            )
    dense_bytes = sum(sparse[name].parameter.nbytes for name in encoded)
    shared = sum(tensor_bytes(tensor) for tensor in export.encoding.constants())
    sites_bytes = sum(done.nbytes for done in encoded.values()) + shared
    requirements: dict[str, int | str] = {"with_past": "yes" if export.format.with_past else "no"}
    if isinstance(export.encoding, SparseInitializers):
        requirements["indices"] = export.encoding.indices
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
        MaskError: one differs by more than the signs of zeros that had no place.
    """
    written = GraphWeights(target / GRAPH)
    for parameter in export.graph.parameters:
        done = encoded.get(parameter.name)
        found = written.read(parameter.name)
        if done is not None and done.swapped:
            found = found.transpose(-1, -2)
        lost = lost_signs(found, export.parameters.read(parameter))
        if lost != (done.negative_zeros if done else 0):
            raise MaskError(f"{parameter.name}: decoded from the export, it is not the model's weight")
    return len(export.graph.parameters)


def _compare_logits(export: _Export, target: Path, twin: bool) -> dict[str, Any]:
    wanted = export.format.compare_logits
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
        logits_of(real, count_positions=export.format.with_past and takes_positions(real)),
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
