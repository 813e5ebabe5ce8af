"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt, beside a form that depends on nothing.

`model.safetensors` of the export holds, for each site NAME:

| tensor         | shape          | dtype        | what                                                   | layout     |
|----------------|----------------|--------------|--------------------------------------------------------|------------|
| NAME.packed    | [m, 9k/16]     | the weight's | `[values, meta]` as the library wants it on that SM    | cusparselt |
| NAME.values    | [m, k/2]       | the weight's | the two kept entries of each group of four             | both       |
| NAME.positions | [m, ceil(k/8)] | uint8        | two groups a byte, low nibble first, idx0, idx1 << 2   | both       |

and every other tensor of the model as it is. A pack is tied to the SM and the library; values and
positions are not, and give the weight back bit for bit, but for negative zeros that have no slot. A dtype
that has no public pack is stored as values and positions alone (layout `neutral`); a shape that the library
cannot take stays dense.
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from spp_fx.checkpoint import Shard, torch_dtype, write_safetensors
from spp_fx.errors import MaskError, PatternError, UsageError
from spp_fx.exporters.cusparselt_layout import Sm, from_neutral, refusal
from spp_fx.exporters.cusparselt_reader import WEIGHTS, Layout, bits, part_specs, read, read_sites
from spp_fx.exporters.manifest import TensorRecord, read_manifest
from spp_fx.exporters.read_back import check_copied
from spp_fx.exporters.registry import ExportSettings, Format, Say, Tick, register
from spp_fx.exporters.semi_structured import clear_negative_zeros, pack_2_4
from spp_fx.exporters.source import ROUND_TO, Source, scan_stored
from spp_fx.sparsity import LockEntry, PackedMask, parse_pattern, scan_bits

DOCUMENTED_FOR = "cuSPARSELt 0.6 to 0.8"
"""The versions that the public kernels were written for, from which the order of a pack is known."""
NOT_2_4 = "it is not 2:4"
STACK = "it is a stack of matrices, the library takes one matrix"


def choose_layout(mask: PackedMask, dtype: str, sm: Sm) -> tuple[Layout, str | None]:
    """How a weight is stored for this SM, and why not packed if it is not."""
    if len(mask.shape) != 2:
        return "dense", STACK
    if mask.columns % 4 or scan_bits(mask, parse_pattern("2:4")).count:
        return "dense", NOT_2_4
    reason = refusal(mask.shape, torch_dtype(dtype), sm)
    if reason is None:
        return "cusparselt", None
    return ("dense" if dtype in ("F16", "BF16") else "neutral"), reason


def pack_parts(name: str, weight: Tensor, sm: Sm, layout: Layout) -> tuple[dict[str, Tensor], int]:
    """The stored tensors of a site, and how many zeros of negative sign had to be written as +0.

    Args:
        weight: (out, in), canonical, 2:4.
    """
    count = 0
    try:
        neutral = pack_2_4(weight)
    except PatternError:
        # The weight is 2:4, so what had no slot is a zero with a sign: the one thing the form cannot keep.
        weight, count = clear_negative_zeros(weight)
        neutral = pack_2_4(weight)
    parts = {"values": neutral.values, "positions": neutral.positions}
    if layout == "cusparselt":
        parts["packed"] = from_neutral(neutral, sm)
    return {f"{name}.{part}": value for part, value in parts.items()}, count


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    if settings.sm not in (80, 90):
        raise UsageError(f"--sm takes 80 (Ampere) or 90 (Hopper), got {settings.sm}")
    sm: Sm = 90 if settings.sm == 90 else 80
    records = {entry.name: _record(source, entry, sm) for entry in source.lock.sites}
    _check_any_2_4(source, records)
    with tempfile.TemporaryFile(dir=target.parent) as spool:
        _write_weights(source, target / WEIGHTS, records, sm, tick, spool)
    source.copy_small_files(target)
    layouts = Counter(record.layout for record in records.values())
    if not layouts["cusparselt"]:
        reasons = _count(records)
        say(f"warning: no weight could be packed for sm{sm}: {reasons}{_hint(records, settings, sm)}")
    source.finish(
        target,
        "cusparselt",
        source.lock,
        list(records.values()),
        requirements={"sm": sm, "layout_documented_for": DOCUMENTED_FOR, "alg_id": 0},
        sizes=_packed_sizes(source, records, target / WEIGHTS),
    )
    return {name: layouts[name] for name in ("cusparselt", "neutral", "dense")} | _read_back(
        source, target, say
    )


def _record(source: Source, entry: LockEntry, sm: Sm) -> TensorRecord:
    mask = scan_stored(source.folder.info(entry.name)[0], entry.name, transposed=entry.transposed).mask
    layout, reason = choose_layout(mask, source.dtype(entry.name), sm)
    return source.record(entry, layout, reason)


def _count(records: dict[str, TensorRecord]) -> str:
    """The reasons of weights that are not packed, each with how many have it."""
    reasons = Counter(record.reason for record in records.values() if record.reason is not None)
    return "; ".join(f"{reason} ({count} of {len(records)})" for reason, count in reasons.most_common())


def _check_any_2_4(source: Source, records: dict[str, TensorRecord]) -> None:
    if all(record.reason in (NOT_2_4, STACK) for record in records.values()):
        patterns = ", ".join(sorted({str(entry.pattern) for entry in source.lock.sites}))
        raise PatternError(
            f"{source.folder.path}: no weight can be packed, cuSPARSELt takes 2:4 matrices alone and the "
            f"lock says {patterns}: {_count(records)}; export it with --format safetensors or onnx, or prune "
            "with --pattern 2:4"
        )


def _hint(records: dict[str, TensorRecord], settings: ExportSettings, sm: Sm) -> str:
    """The first change of options that would pack weights, and how many; empty where none would."""
    other: Sm = 90 if sm == 80 else 80
    half = [] if settings.dtype else ["bfloat16"]
    for dtype, on in [*((d, sm) for d in half), (None, other), *((d, other) for d in half)]:
        count = sum(
            record.reason not in (NOT_2_4, STACK)
            and refusal(tuple(record.shape), ROUND_TO[dtype] if dtype else torch_dtype(record.dtype), on)
            is None
            for record in records.values()
        )
        if count:
            words = [f"--dtype {dtype}"] * (dtype is not None) + [f"--sm {on}"] * (on != sm)
            return f"; {' '.join(words)} would pack {count} of them"
    return ""


def _write_weights(
    source: Source, file: Path, records: dict[str, TensorRecord], sm: Sm, tick: Tick, spool: BinaryIO
) -> None:
    """Write the file; positions, which come last in it, wait in `spool` so that each site is packed once."""
    folder, entries = source.folder, source.lock.by_name()
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    for name in folder.names:
        record = records.get(name)
        if record is None or record.layout == "dense":
            specs.append((name, source.dtype(name), folder.info(name)[1].shape))
        else:
            m, k = record.shape
            specs += part_specs(name, (m, k), record.dtype, cast(Layout, record.layout))
    waiting: dict[str, Tensor] = {}
    spooled: dict[str, tuple[int, int]] = {}

    def pack(site: str) -> None:
        record = records[site]
        parts, zeros = pack_parts(site, source.canonical(entries[site]), sm, cast(Layout, record.layout))
        records[site] = record.model_copy(update={"negative_zeros": zeros})
        positions = parts.pop(f"{site}.positions").contiguous().numpy()
        spooled[site] = spool.tell(), positions.nbytes
        spool.write(positions.data)
        waiting.update(parts)
        tick(site, folder.info(site)[1].nbytes)

    def produce(name: str) -> Tensor:
        if name in folder:
            return source.stored(name)
        site, _, part = name.rpartition(".")
        if site not in spooled:
            pack(site)
        if part != "positions":
            return waiting.pop(name)
        offset, count = spooled[site]
        end = spool.tell()
        spool.seek(offset)
        data = torch.frombuffer(bytearray(spool.read(count)), dtype=torch.uint8)
        spool.seek(end)
        return data.view(records[site].shape[0], -1)

    write_safetensors(file, specs, produce, {"format": "pt"})


def _packed_sizes(source: Source, records: dict[str, TensorRecord], file: Path) -> dict[str, int]:
    """Bytes of the sites that are not dense: as the model holds them, and in each form; of the whole file."""
    shard = Shard.open(file)
    sparse = [name for name, record in records.items() if record.layout != "dense"]
    packed = [name for name in sparse if records[name].layout == "cusparselt"]
    neutral = ("values", "positions")
    return {
        "dense_bytes": sum(source.folder.info(name)[1].nbytes for name in sparse),
        "packed_bytes": sum(shard.info(f"{name}.packed").nbytes for name in packed),
        "neutral_bytes": sum(shard.info(f"{name}.{part}").nbytes for name in sparse for part in neutral),
        "file_bytes": file.stat().st_size,
    }


def _read_back(source: Source, target: Path, say: Say) -> dict[str, int]:
    """Decode every site from the file just written and compare the other tensors; returns what was equal.

    Raises:
        MaskError: a value is not the model's; a zero that lost its sign is counted, and said.
    """
    entries = source.lock.by_name()
    checks = {"bit_exact": 0, "signs_of_zeros_lost": 0, "tensors_equal": 0}
    for record, decoded in read_sites(target, read_manifest(target)):
        lost = lost_signs(decoded, source.canonical(entries[record.name]))
        if lost is None:
            raise MaskError(f"{record.name}: decoded from the export, it is not the model's weight")
        checks["signs_of_zeros_lost" if lost else "bit_exact"] += 1
        if lost:
            say(f"warning: {record.name}: {lost} zeros of negative sign were written as +0")
    others = [name for name in source.folder.names if name not in entries]
    checks["tensors_equal"] = check_copied(source.folder, others, target / WEIGHTS, source.as_exported)
    return checks


def lost_signs(decoded: Tensor, stored: Tensor) -> int | None:
    """How many zeros differ in sign alone; None where any other element differs in any bit."""
    if decoded.dtype != stored.dtype or decoded.shape != stored.shape:
        return None
    differing = bits(decoded) != bits(stored)
    if bool((differing & ~((decoded == 0) & (stored == 0))).any()):
        return None
    return int(differing.sum())


FORMAT = register(Format("cusparselt", write, read, frozenset({"sm", "dtype"})))
