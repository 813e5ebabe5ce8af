"""onnx: the whole model as one graph, its sparse weights as sparse initializers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.checkpoint import dtype_name
from spp_fx.exporters.manifest import Manifest, TensorRecord
from spp_fx.exporters.onnx_check import check_standard, compare_logits
from spp_fx.exporters.onnx_graph import build_onnx, locate
from spp_fx.exporters.onnx_reader import SparseInitializer, load_sparse_masks
from spp_fx.exporters.onnx_sparse import save, size_report, sparsify
from spp_fx.exporters.registry import ExportSettings, Format, Say, Tick, Weights, register
from spp_fx.exporters.source import Source
from spp_fx.ir.program import Program
from spp_fx.ir.trace import load_model, trace
from spp_fx.passes import Canonicalize, run_pipeline
from spp_fx.sparsity import (
    Lock,
    LockEntry,
    PackedMask,
    Scan,
    detect_pattern,
    make_entry,
    pack_mask,
    scan_tensor,
)

GRAPH = "model.onnx"


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    program = trace(load_model(source.folder.path, trust_remote_code=source.trust_remote_code)).eval()
    run_pipeline(program, [Canonicalize()])
    lock, names = _graph_lock(source, program)
    dense = build_onnx(program)
    found = locate(dense, program)
    sparse, tensors = sparsify(dense, [found[name].initializer for name in names], settings.indices)
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
    for entry in lock.sites:
        tensor = by_name[found[entry.name].initializer]
        details: dict[str, int | str] = {"nnz": tensor.nnz, "dense_bytes": tensor.dense_bytes}
        if tensor.sparse_bytes is not None:
            details |= {"sparse_bytes": tensor.sparse_bytes, "index_type": str(tensor.index_type)}
        dtype = dtype_name(program.weight(entry.name).dtype)
        records.append(
            TensorRecord(
                name=entry.name,
                shape=list(entry.shape),
                dtype=dtype,
                layout="sparse_initializer" if tensor.reason is None else "dense",
                reason=tensor.reason,
                transposed=entry.transposed,
                details=details,
            )
        )
    sizes = {
        "dense_bytes": report.dense_bytes,
        "sparse_bytes": report.sparse_bytes,
        "other_bytes": report.other_bytes,
    }
    source.finish(target, "onnx", lock, records, requirements={"indices": settings.indices}, sizes=sizes)
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
        "tolerance": logits.tolerance,
        "argmax_agreement": logits.argmax_agreement,
        "standard_checker": "passed"
        if settings.indices == "int64"
        else "not run: it takes int64 indices only",
    }


def _graph_lock(source: Source, program: Program) -> tuple[Lock, list[str]]:
    """The lock in the graph's own names: a stack of experts is one tensor there, whatever it is on disk."""
    locked = source.lock.by_name()
    entries: list[LockEntry] = []
    for name, site in program.sites.items():
        if name in locked:
            entries.append(locked[name])
        elif site.tied_to is None and not site.is_head:
            mask = pack_mask(program.weight(name).detach(), transposed=site.transposed)
            pattern = detect_pattern(mask)
            if pattern is not None:
                entries.append(make_entry(name, site.kind, mask, pattern, site.transposed))
    return Lock.of(entries), [entry.name for entry in entries]


def _size_line(dense: int, sparse: int, other: int, larger: int, count: int) -> str:
    word = "LARGER" if sparse > dense else "smaller"
    return (
        f"sparse initializers: {sparse / 1e6:.2f} MB where dense is {dense / 1e6:.2f} MB, "
        f"{abs(sparse / dense - 1):.0%} {word} ({larger} of {count} weights grow); "
        f"{other / 1e6:.2f} MB are the same either way"
    )


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export's graph."""
    del manifest
    return read_graph(folder / GRAPH)


def read_graph(path: Path) -> Weights:
    """The weights of an .onnx file; each is read once, its mask kept."""
    masks: dict[str, Scan] = {}
    sparse: set[str] = set()
    for found in load_sparse_masks(path):
        if isinstance(found, SparseInitializer):
            sparse.add(found.name)
            values = torch.from_numpy(found.values.astype("float32"))
            finite = scan_tensor(values.reshape(1, -1))
            masks[found.name] = Scan(
                PackedMask.from_bool(found.mask()), finite.non_finite, finite.first_non_finite
            )
        else:
            masks[found.name] = scan_tensor(_tensor(found.array))

    def scan(name: str, transposed: bool) -> Scan:
        if not transposed:
            return masks[name]
        stored = masks[name]
        mask = PackedMask.from_bool(stored.mask.to_bool().swapaxes(-1, -2))
        return Scan(mask, stored.non_finite, stored.first_non_finite)

    def sites() -> Mapping[str, bool]:
        return dict.fromkeys(sparse, False)

    return Weights(frozenset(masks), scan, lambda _: path.name, sites)


def _tensor(array: object) -> Tensor:
    try:
        return torch.from_numpy(array)  # type: ignore[arg-type]
    except TypeError:  # bfloat16, which numpy has only through ml_dtypes
        return torch.from_numpy(array.astype("float32"))  # type: ignore[attr-defined]


FORMAT = register(Format("onnx", write, read))
