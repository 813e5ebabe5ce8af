"""export: a sparse model folder in the form that a runtime takes, checked from disk before it says ok."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spp_fx import __version__
from spp_fx.checkpoint import (
    ModelFolder,
    Shard,
    atomic_folder,
    copy_file,
    dtype_name,
    rewrite_model,
    torch_dtype,
    write_safetensors,
)
from spp_fx.errors import MaskError, UsageError
from spp_fx.exporters import cusparselt
from spp_fx.exporters.cusparselt_layout import Sm
from spp_fx.exporters.manifest import Manifest, TensorRecord, read_manifest, write_manifest
from spp_fx.exporters.onnx_check import check_standard, compare_logits
from spp_fx.exporters.onnx_graph import build_onnx, locate
from spp_fx.exporters.onnx_sparse import save, size_report, sparsify
from spp_fx.ir.trace import load_model, trace
from spp_fx.passes import Canonicalize, run_pipeline
from spp_fx.sparsity import LOCK_NAME, Lock, LockEntry, detect_pattern, load_lock, make_entry, pack_mask
from spp_fx.workflows.survey import Tick, no_tick, scan_tensor, survey, tensors_of
from spp_fx.workflows.verify import verify

Format = Literal["safetensors", "cusparselt", "onnx"]
Indices = Literal["smallest", "int64"]
Say = Callable[[str], None]
ROUND_TO = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportSettings:
    """Options of the formats.

    Attributes:
        sm: GPU generation of a cusparselt pack, 80 or 90.
        dtype: float16 or bfloat16 to round the sparse weights of a cusparselt export to; None keeps theirs.
        indices: index type of onnx.
    """

    sm: int = 80
    dtype: str | None = None
    indices: Indices = "smallest"


@dataclass(frozen=True)
class Exported:
    """What export wrote, and what was checked of it."""

    out: Path
    manifest: Manifest
    checks: dict[str, Any]

    def reasons(self) -> dict[str, list[str]]:
        """Why weights are not in the format's own layout: reason -> names."""
        found: dict[str, list[str]] = {}
        for tensor in self.manifest.tensors:
            if tensor.reason is not None:
                found.setdefault(tensor.reason, []).append(tensor.name)
        return found

    def to_json(self) -> dict[str, Any]:
        files = sorted(p for p in self.out.rglob("*") if p.is_file())
        return {
            "ok": True,
            "out": str(self.out),
            "format": self.manifest.format,
            "pattern": self.manifest.pattern,
            "sizes": self.manifest.sizes,
            "sites": [
                {"name": t.name, "shape": t.shape, "layout": t.layout, "reason": t.reason, **t.details}
                for t in self.manifest.tensors
            ],
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "checks": self.checks,
        }


def export(
    model: Path,
    out: Path,
    format: Format,
    settings: ExportSettings | None = None,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
) -> Exported:
    """Write an export folder beside its manifest and lock; what was written is read back and compared.

    Raises:
        UsageError: unknown format or SM, or an output that exists.
        MaskError: what was read back is not the model. Nothing is written.
    """
    writers = {"safetensors": _safetensors, "cusparselt": _cusparselt, "onnx": _onnx}
    if format not in writers:
        raise UsageError(f"unknown format '{format}'; known: {', '.join(writers)}")
    settings = settings or ExportSettings()
    if settings.dtype is not None and format != "cusparselt":
        raise UsageError("--dtype belongs to --format cusparselt; the other formats keep the model's own")
    if settings.sm not in (80, 90):
        raise UsageError(f"--sm takes 80 (Ampere) or 90 (Hopper), got {settings.sm}")
    with atomic_folder(out, force, sources=[model]) as temporary:
        source = _Source.open(model, trust_remote_code)
        checks = writers[format](source, temporary, settings, tick, say)
        verdict = verify(temporary)
        if not verdict.ok:
            broken = next(site for site in verdict.sites if not site.ok)
            raise MaskError(f"{broken.name}: read back from the export: {broken.reason}")
        checks["masks_equal"] = len(verdict.sites)
    return Exported(out, read_manifest(out, check_files=False), checks)


@dataclass(frozen=True)
class _Source:
    """The model to export with its lock: the one it came with, or one made of its sparse sites."""

    folder: ModelFolder
    lock: Lock
    trust_remote_code: bool
    rounded_to: torch.dtype | None = None

    @classmethod
    def open(cls, model: Path, trust_remote_code: bool) -> "_Source":
        folder = ModelFolder.open(model)
        if (model / LOCK_NAME).is_file():
            verdict = verify(model)
            if not verdict.ok:
                broken = next(site for site in verdict.sites if not site.ok)
                raise MaskError(f"{model}: {broken.name}: {broken.reason}; export only what verifies")
            return cls(folder, load_lock(model / LOCK_NAME), trust_remote_code)
        found = survey(model, trust_remote_code=trust_remote_code)
        entries: list[LockEntry] = []
        for site, pieces in found.pieces.items():
            for tensor, piece in tensors_of(pieces).items():
                mask = scan_tensor(folder, tensor, transposed=piece.transposed).mask
                pattern = detect_pattern(mask)
                if pattern is not None:
                    kind = found.program.sites[site].kind
                    entries.append(make_entry(tensor, kind, mask, pattern, piece.transposed))
        if not entries:
            raise UsageError(f"{model}: is dense, there is nothing sparse to export; see 'spp-fx prune'")
        return cls(folder, Lock.of(entries), trust_remote_code)

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is exported in."""
        own = self.folder.info(name)[1].dtype
        floating = torch_dtype(own).is_floating_point
        return dtype_name(self.rounded_to) if floating and self.rounded_to is not None else own

    def stored(self, name: str) -> Tensor:
        """A tensor as it is exported: the model's, rounded where that was asked for, no zero gained."""
        value = self.folder.read(name)
        if self.rounded_to is None or not value.is_floating_point():
            return value
        rounded = value.to(self.rounded_to)
        if bool((rounded.isinf() & ~value.isinf()).any()):
            raise MaskError(f"{name}: a value is too large for {self.rounded_to}; choose another --dtype")
        smallest = torch.tensor(torch.finfo(self.rounded_to).tiny, dtype=self.rounded_to)
        return torch.where((value != 0) & (rounded == 0), torch.copysign(smallest, rounded), rounded)

    def canonical(self, entry: LockEntry) -> Tensor:
        stored = self.stored(entry.name)
        return stored.transpose(-1, -2) if entry.transposed else stored

    def copy_small_files(self, target: Path) -> None:
        """Configuration, tokenizer and whatever else is no weight."""
        for name in self.folder.other_files():
            if name.as_posix() != LOCK_NAME:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.folder.path / name, target / name)

    def record(self, entry: LockEntry, layout: str, reason: str | None = None, **extra: Any) -> TensorRecord:
        return TensorRecord(
            name=entry.name,
            shape=list(entry.shape),
            dtype=self.dtype(entry.name),
            layout=layout,
            reason=reason,
            transposed=entry.transposed,
            **extra,
        )

    def manifest(
        self, folder: Path, format: Format, lock: Lock, records: list[TensorRecord], **fields: Any
    ) -> None:
        (folder / LOCK_NAME).write_text(lock.dumps())
        fields = {"requirements": {}, "sizes": {}} | fields
        write_manifest(
            folder, spp_fx_version=__version__, format=format, pattern=lock.pattern, tensors=records, **fields
        )


def _safetensors(
    source: _Source, target: Path, settings: ExportSettings, tick: Tick, say: Say
) -> dict[str, Any]:
    """Plain dense safetensors for servers: the folder as it is, with lock and manifest."""
    del settings, say

    def keep(shard: Shard, info: Any) -> None:
        tick(info.name, info.nbytes)

    rewrite_model(source.folder, target, keep, skip=[LOCK_NAME, "export.json"])
    records = [source.record(entry, "dense") for entry in source.lock.sites]
    size = source.folder.stored_bytes
    source.manifest(target, "safetensors", source.lock, records, sizes={"dense_bytes": size, "bytes": size})
    return {}


def _cusparselt(
    source: _Source, target: Path, settings: ExportSettings, tick: Tick, say: Say
) -> dict[str, Any]:
    sm: Sm = 90 if settings.sm == 90 else 80
    if settings.dtype is not None:
        if settings.dtype not in ROUND_TO:
            raise UsageError(f"--dtype takes {' or '.join(ROUND_TO)}, got '{settings.dtype}'")
        source = replace(source, rounded_to=ROUND_TO[settings.dtype])
    folder, entries = source.folder, source.lock.by_name()
    records: dict[str, TensorRecord] = {}
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    for name in folder.names:
        info = folder.info(name)[1]
        if name not in entries:
            specs.append((name, source.dtype(name), info.shape))
            continue
        entry, dtype = entries[name], source.dtype(name)
        mask = scan_tensor(folder, name, transposed=entry.transposed).mask
        layout, reason = cusparselt.choose_layout(mask, dtype, sm)
        records[name] = source.record(entry, layout, reason)
        if layout == cusparselt.DENSE:
            specs.append((name, dtype, info.shape))
        else:
            m, k = entry.shape
            specs += cusparselt.part_specs(name, (m, k), dtype, layout)
    parts: dict[str, Tensor] = {}

    def produce(name: str) -> list[Tensor]:
        if name in folder:
            return [source.stored(name)]
        site, _, _ = name.rpartition(".")
        if name not in parts:
            parts.clear()
            made, zeros = cusparselt.pack_parts(
                site, source.canonical(entries[site]), sm, records[site].layout
            )
            parts.update(made)
            records[site] = records[site].model_copy(update={"negative_zeros": zeros})
            tick(site, folder.info(site)[1].nbytes)
        return [parts[name]]

    write_safetensors(target / cusparselt.WEIGHTS, specs, produce, {"format": "pt"})
    source.copy_small_files(target)
    if settings.dtype is not None:
        _say_dtype(target / "config.json", settings.dtype)
    by_layout = {
        layout: [r.name for r in records.values() if r.layout == layout]
        for layout in (cusparselt.PACKED, cusparselt.NEUTRAL, cusparselt.DENSE)
    }
    if not by_layout[cusparselt.PACKED]:
        reason = next(r.reason for r in records.values())
        say(f"warning: no weight could be packed for sm{sm}: {reason}; try --dtype bfloat16 or another --sm")
    source.manifest(
        target,
        "cusparselt",
        source.lock,
        list(records.values()),
        requirements={"sm": sm, "library": cusparselt.LIBRARY, "alg_id": 0},
        sizes=_packed_sizes(source, by_layout, target / cusparselt.WEIGHTS),
    )
    _decode_back(source, target)
    return {layout: len(names) for layout, names in by_layout.items()} | {"bit_exact": len(records)}


def _say_dtype(path: Path, dtype: str) -> None:
    """Put the dtype of rounded weights into the copied config.json."""
    config = json.loads(path.read_bytes())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


def _packed_sizes(source: _Source, by_layout: dict[str, list[str]], file: Path) -> dict[str, int]:
    """Bytes of the sites that are not dense: as the model holds them, and in each form; of the whole file."""
    shard = Shard.open(file)
    sparse = [name for layout, names in by_layout.items() if layout != cusparselt.DENSE for name in names]
    packed = by_layout[cusparselt.PACKED]
    neutral = ("values", "positions")
    return {
        "dense_bytes": sum(source.folder.info(name)[1].nbytes for name in sparse),
        "packed_bytes": sum(shard.info(f"{name}.packed").nbytes for name in packed),
        "neutral_bytes": sum(shard.info(f"{name}.{part}").nbytes for name in sparse for part in neutral),
        "file_bytes": file.stat().st_size,
    }


def _decode_back(source: _Source, target: Path) -> None:
    """Decode every site from the files just written; it must be the model's weight to the bit."""
    entries = source.lock.by_name()
    for record, weight in cusparselt.read_sites(target, read_manifest(target)):
        if not cusparselt.same_weight(weight, source.canonical(entries[record.name]), record.negative_zeros):
            raise MaskError(f"{record.name}: decoded from the export, it is not the model's weight")


def _onnx(source: _Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
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
    save(sparse, target / "model.onnx")
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
    source.manifest(target, "onnx", lock, records, requirements={"indices": settings.indices}, sizes=sizes)
    if settings.indices == "int64":
        check_standard(target / "model.onnx")
    logits = compare_logits(
        target / "model.onnx",
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


def _graph_lock(source: _Source, program: Any) -> tuple[Lock, list[str]]:
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
