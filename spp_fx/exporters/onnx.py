"""onnx: the whole model as one graph, its sparse weights as sparse initializers."""

from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spp_fx.checkpoint import dtype_name
from spp_fx.errors import MaskError
from spp_fx.exporters.manifest import Part, TensorRecord
from spp_fx.exporters.onnx_check import check_standard, compare_logits
from spp_fx.exporters.onnx_graph import WeightLocation, build_onnx, locate
from spp_fx.exporters.onnx_sparse import SparsifiedTensor, save, size_report, sparse_bytes, sparsify
from spp_fx.exporters.onnx_weights import GRAPH, read, read_graph
from spp_fx.exporters.registry import ExportSettings, Format, Say, Tick, register
from spp_fx.exporters.source import Source
from spp_fx.ir.binding import bind
from spp_fx.ir.program import Program
from spp_fx.ir.trace import load_model, trace
from spp_fx.passes import Canonicalize, run_pipeline
from spp_fx.sparsity import LockEntry, compare, pack_mask

__all__ = ["FORMAT", "GRAPH", "place_sites", "read", "read_graph", "write"]


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    model = load_model(source.folder.path, trust_remote_code=source.trust_remote_code)
    program = trace(model).eval()
    run_pipeline(program, [Canonicalize()])
    places = place_sites(source, model, program)
    dense = build_onnx(program)
    places = _in_graph(places, locate(dense, program), source)
    sparse, tensors = sparsify(dense, [part.initializer for _, part in places.values()], settings.indices)
    report = size_report(sparse, tensors)
    del dense
    say(
        _size_line(
            report.dense_bytes, report.sparse_bytes, report.other_bytes, len(report.larger), len(tensors)
        )
    )
    save(sparse, target / GRAPH)
    del sparse
    source.copy_small_files(target)
    by_name = {tensor.name: tensor for tensor in tensors}
    records: list[TensorRecord] = []
    for entry in source.lock.sites:
        site, part = places[entry.name]
        dtype = dtype_name(program.weight(site).dtype)
        records.append(_record(entry, part, by_name[part.initializer], dtype, settings))
    sizes = {
        "dense_bytes": report.dense_bytes,
        "sparse_bytes": report.sparse_bytes,
        "other_bytes": report.other_bytes,
    }
    source.finish(
        target, "onnx", source.lock, records, requirements={"indices": settings.indices}, sizes=sizes
    )
    if settings.indices == "int64":
        check_standard(target / GRAPH)
    logits = compare_logits(
        target / GRAPH,
        lambda ids, mask: program(ids, mask).logits,
        program.config.vocab_size,
        max_length=getattr(program.config, "max_position_embeddings", None),
    )
    return {
        "max_abs_difference": logits.max_abs_difference,
        "allowed_difference": logits.tolerance * logits.spread,
        "argmax_agreement": logits.argmax_agreement,
        "standard_checker": "passed"
        if settings.indices == "int64"
        else "not run: it takes int64 indices only",
    }


Places = dict[str, tuple[str, Part]]
"""Stored tensor -> the program's name of the weight that it is in, and where."""


def place_sites(source: Source, model: PreTrainedModel, program: Program) -> Places:
    """Where each site of the source's lock is in the loaded model, with the lock's zeros.

    Raises:
        MaskError: transformers loaded a site with other zeros, or no linear of the program reads it.
    """
    folder, entries = source.folder, source.lock.by_name()
    stored = {name: folder.info(name)[1].shape for name in folder.names}
    places: Places = {}
    for site, pieces in bind(model, program.sites, stored).pieces.items():
        for piece in pieces:
            entry = entries.get(piece.tensor)
            if entry is None or piece.tensor in places:
                continue
            stacked = piece.expert is not None and not piece.whole
            part = (
                Part(initializer=site, expert=piece.expert, start=piece.start, stop=piece.stop)
                if stacked
                else Part(initializer=site)
            )
            weight = program.weight(site).detach()
            weight = weight[part.expert, part.start : part.stop] if stacked else weight
            found = compare(entry, pack_mask(weight, transposed=entry.transposed))
            if not found.equal:
                flips = [(*place, "zero in the lock, non-zero") for place in found.lost_zeros]
                flips += [(*place, "non-zero in the lock, zero") for place in found.new_zeros]
                where = found.reason or "row {}, column {}: {} as loaded".format(*flips[0])
                raise MaskError(
                    f"{piece.tensor}: transformers loads it as {site} with other zeros than the lock's: {where}"
                )
            places[piece.tensor] = site, part
    _check_all(source, places, "no linear of the loaded model reads it")
    return places


def _in_graph(places: Places, found: dict[str, WeightLocation], source: Source) -> Places:
    """The same places by the names of the graph, which has one for all names of a tied weight."""
    located = {
        name: (site, part.model_copy(update={"initializer": found[site].initializer}))
        for name, (site, part) in places.items()
        if site in found
    }
    _check_all(source, located, "the ONNX graph does not hold it")
    return located


def _check_all(source: Source, places: Places, why: str) -> None:
    missing = [entry.name for entry in source.lock.sites if entry.name not in places]
    if missing:
        raise MaskError(
            f"{missing[0]} and {len(missing) - 1} more of the lock's {len(source.lock.sites)} sites cannot be "
            f"exported to onnx: {why}"
        )


def _record(
    entry: LockEntry, part: Part, tensor: SparsifiedTensor, dtype: str, settings: ExportSettings
) -> TensorRecord:
    """A site's record; its bytes are its share of the graph's tensor."""
    itemsize = tensor.dense_bytes // max(1, prod(tensor.shape))
    details: dict[str, int | str] = {"nnz": entry.nnz, "dense_bytes": prod(entry.shape) * itemsize}
    if tensor.reason is None:
        size = sparse_bytes(prod(tensor.shape), entry.nnz, itemsize, settings.indices)
        details |= {"sparse_bytes": size, "index_type": str(tensor.index_type)}
    return TensorRecord(
        name=entry.name,
        shape=list(entry.shape),
        dtype=dtype,
        layout="sparse_initializer" if tensor.reason is None else "dense",
        reason=tensor.reason,
        transposed=entry.transposed,
        details=details,
        part=None if part == Part(initializer=entry.name) else part,
    )


def _size_line(dense: int, sparse: int, other: int, larger: int, count: int) -> str:
    word = "LARGER" if sparse > dense else "smaller"
    return (
        f"sparse initializers: {sparse / 1e6:.2f} MB where dense is {dense / 1e6:.2f} MB, "
        f"{abs(sparse / dense - 1):.0%} {word} ({larger} of {count} weights grow); "
        f"{other / 1e6:.2f} MB are the same either way"
    )


FORMAT = register(Format("onnx", write, read, frozenset({"indices"})))
