"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt, beside a form that depends on nothing.

`model.safetensors` of the export holds, for each site NAME:

| tensor         | shape          | dtype        | what                                                   | layout     |
|----------------|----------------|--------------|--------------------------------------------------------|------------|
| NAME.packed    | [m, 9k/16]     | the weight's | `[values, meta]` as the library wants it on that SM    | cusparselt |
| NAME.values    | [m, k/2]       | the weight's | the two kept entries of each group of four             | both       |
| NAME.positions | [m, ceil(k/8)] | uint8        | two groups a byte, low nibble first, idx0, idx1 << 2   | both       |

and every other tensor of the model as it is. A pack is tied to the SM and the library; values and
positions are not, and give the weight back bit for bit. A dtype that has no public pack is stored as
values and positions alone (layout `neutral`); a shape that the library cannot take stays dense.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.checkpoint import Shard, torch_dtype, write_safetensors
from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.exporters.cusparselt_layout import Sm, from_neutral, refusal, unpack
from spp_fx.exporters.manifest import Manifest, TensorRecord, read_manifest
from spp_fx.exporters.registry import ExportSettings, Format, Say, Tick, Weights, register
from spp_fx.exporters.semi_structured import Packed24, clear_negative_zeros, pack_2_4, unpack_2_4
from spp_fx.exporters.source import Source
from spp_fx.sparsity import PackedMask, Scan, parse_pattern, scan_bits, scan_file, scan_tensor

PACKED = "cusparselt"
NEUTRAL = "neutral"
DENSE = "dense"
WEIGHTS = "model.safetensors"
PARTS = {PACKED: ("packed", "values", "positions"), NEUTRAL: ("values", "positions"), DENSE: ()}
ROUND_TO = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARY = "cuSPARSELt 0.6 to 0.8, alg_id 0"


def choose_layout(mask: PackedMask, dtype: str, sm: Sm) -> tuple[str, str | None]:
    """How a weight is stored for this SM, and why not packed if it is not."""
    if len(mask.shape) != 2 or mask.columns % 4 or scan_bits(mask, parse_pattern("2:4")).count:
        return DENSE, "it is not 2:4"
    reason = refusal(mask.shape, torch_dtype(dtype), sm)
    if reason is None:
        return PACKED, None
    return (DENSE if dtype in ("F16", "BF16") else NEUTRAL), reason


def part_specs(
    name: str, shape: tuple[int, int], dtype: str, layout: str
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that store a site."""
    m, k = shape
    forms = {
        "packed": (dtype, (m, 9 * k // 16)),
        "values": (dtype, (m, k // 2)),
        "positions": ("U8", (m, -(-k // 8))),
    }
    return [(f"{name}.{part}", *forms[part]) for part in PARTS[layout]]


def pack_parts(name: str, weight: Tensor, sm: Sm, layout: str) -> tuple[dict[str, Tensor], int]:
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
    if layout == PACKED:
        parts["packed"] = from_neutral(neutral, sm)
    return {f"{name}.{part}": value for part, value in parts.items()}, count


def read_weight(shard: Shard, record: TensorRecord, sm: Sm) -> Tensor:
    """A site's canonical weight, decoded from every form it is stored in; they must agree to the bit.

    Raises:
        FormatError: a part is missing or of a wrong shape, or the pack says another weight than the
            neutral form.
    """
    m, k = record.shape
    for part, dtype, shape in part_specs(record.name, (m, k), record.dtype, record.layout):
        info = shard.info(part)
        if info.dtype != dtype or info.shape != shape:
            raise FormatError(
                f"{shard.path}: {part} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    values, positions = (shard.read(f"{record.name}.{part}") for part in ("values", "positions"))
    neutral = unpack_2_4(Packed24(values, positions), k)
    if record.layout == NEUTRAL:
        return neutral
    packed = unpack(shard.read(f"{record.name}.packed"), (m, k), sm)
    if not torch.equal(_bits(neutral), _bits(packed)):
        row, column = divmod(int((_bits(neutral) != _bits(packed)).flatten().to(torch.uint8).argmax()), k)
        raise FormatError(
            f"{shard.path}: {record.name}: row {row}, column {column}: the packed form says another value "
            "than the layout-neutral one"
        )
    return neutral


def read_sites(folder: Path, manifest: Manifest) -> Iterator[tuple[TensorRecord, Tensor]]:
    """Every site of an export with its canonical weight."""
    shard = Shard.open(folder / WEIGHTS)
    sm = sm_of(manifest)
    for record in manifest.tensors:
        if record.layout != DENSE:
            yield record, read_weight(shard, record, sm)
        else:
            stored = shard.read(record.name)
            yield record, stored.transpose(-1, -2) if record.transposed else stored


def sm_of(manifest: Manifest) -> Sm:
    """The SM a manifest's packs are made for."""
    sm = manifest.requirements.get("sm")
    if sm not in (80, 90):
        raise FormatError(f"export.json: requirements.sm is {sm!r}, expected 80 or 90")
    return sm  # type: ignore[return-value]


def same_weight(decoded: Tensor, stored: Tensor, negative_zeros: int) -> bool:
    """Whether a decoded weight is the stored one to the bit, but for that many zeros of negative sign."""
    differing = _bits(decoded) != _bits(stored)
    both_zero = (decoded == 0) & (stored == 0)
    return not bool((differing & ~both_zero).any()) and int(differing.sum()) <= negative_zeros


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    if settings.sm not in (80, 90):
        raise UsageError(f"--sm takes 80 (Ampere) or 90 (Hopper), got {settings.sm}")
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
        mask = _scan_stored(source, entry.name, entry.transposed).mask
        layout, reason = choose_layout(mask, dtype, sm)
        records[name] = source.record(entry, layout, reason)
        if layout == DENSE:
            specs.append((name, dtype, info.shape))
        else:
            m, k = entry.shape
            specs += part_specs(name, (m, k), dtype, layout)
    parts: dict[str, Tensor] = {}

    def produce(name: str) -> list[Tensor]:
        if name in folder:
            return [source.stored(name)]
        site, _, _ = name.rpartition(".")
        if name not in parts:
            parts.clear()
            made, zeros = pack_parts(site, source.canonical(entries[site]), sm, records[site].layout)
            parts.update(made)
            records[site] = records[site].model_copy(update={"negative_zeros": zeros})
            tick(site, folder.info(site)[1].nbytes)
        return [parts[name]]

    write_safetensors(target / WEIGHTS, specs, produce, {"format": "pt"})
    source.copy_small_files(target)
    if settings.dtype is not None:
        _say_dtype(target / "config.json", settings.dtype)
    by_layout = {
        layout: [r.name for r in records.values() if r.layout == layout]
        for layout in (PACKED, NEUTRAL, DENSE)
    }
    if not by_layout[PACKED]:
        reason = next(r.reason for r in records.values())
        say(f"warning: no weight could be packed for sm{sm}: {reason}; try --dtype bfloat16 or another --sm")
    source.finish(
        target,
        "cusparselt",
        source.lock,
        list(records.values()),
        requirements={"sm": sm, "library": LIBRARY, "alg_id": 0},
        sizes=_packed_sizes(source, by_layout, target / WEIGHTS),
    )
    _decode_back(source, target)
    return {layout: len(names) for layout, names in by_layout.items()} | {"bit_exact": len(records)}


def _say_dtype(path: Path, dtype: str) -> None:
    """Put the dtype of rounded weights into the copied config.json."""
    config = json.loads(path.read_bytes())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


def _packed_sizes(source: Source, by_layout: dict[str, list[str]], file: Path) -> dict[str, int]:
    """Bytes of the sites that are not dense: as the model holds them, and in each form; of the whole file."""
    shard = Shard.open(file)
    sparse = [name for layout, names in by_layout.items() if layout != DENSE for name in names]
    packed = by_layout[PACKED]
    neutral = ("values", "positions")
    return {
        "dense_bytes": sum(source.folder.info(name)[1].nbytes for name in sparse),
        "packed_bytes": sum(shard.info(f"{name}.packed").nbytes for name in packed),
        "neutral_bytes": sum(shard.info(f"{name}.{part}").nbytes for name in sparse for part in neutral),
        "file_bytes": file.stat().st_size,
    }


def _decode_back(source: Source, target: Path) -> None:
    """Decode every site from the files just written; it must be the model's weight to the bit."""
    entries = source.lock.by_name()
    for record, weight in read_sites(target, read_manifest(target)):
        if not same_weight(weight, source.canonical(entries[record.name]), record.negative_zeros):
            raise MaskError(f"{record.name}: decoded from the export, it is not the model's weight")


def _scan_stored(source: Source, name: str, transposed: bool) -> Scan:
    shard, info = source.folder.info(name)
    return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export, decoded from every form that they are stored in."""
    shard, sm = Shard.open(folder / WEIGHTS), sm_of(manifest)
    records = {record.name: record for record in manifest.tensors}

    def scan(name: str, transposed: bool) -> Scan:
        record = records[name]
        if record.layout != DENSE:
            return scan_tensor(read_weight(shard, record, sm))
        info = shard.info(name)
        return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=record.transposed)

    sites = {name: record.transposed for name, record in records.items()}
    return Weights(frozenset(records), scan, lambda _: shard.name, lambda: sites)


FORMAT = register(Format("cusparselt", write, read))
