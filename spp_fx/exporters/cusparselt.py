"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt.

`packed.safetensors` of the export holds, for each site NAME of m rows and k columns, by its layout:

| layout     | tensor         | shape          | dtype        | what                                               |
|------------|----------------|----------------|--------------|----------------------------------------------------|
| cusparselt | NAME.packed    | [m, 9k/16]     | the weight's | `[values, meta]` as the library wants it on an SM  |
| neutral    | NAME.values    | [m, k/2]       | the weight's | the two kept entries of each group of four         |
| neutral    | NAME.positions | [m, ceil(k/8)] | uint8        | two groups a byte, low nibble first, idx0, idx1<<2 |

and every other tensor of the model as it is. A pack is tied to the SM and the library: `requirements` of
the manifest says which, and whether its order is proven. Where no pack is public (another SM, dtype or
shape) a 2:4 matrix is stored in the neutral form, which is packed at load; the record's reason says so.

Either form gives the weight back bit for bit, but for negative zeros that have no slot: the neutral form
of a pack is `cusparselt_reader.neutral_form`.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.exporters.cusparselt_layout import BLOCK, ORDER, UNKNOWN_ORDER, Sm, fill, refusal, views
from spp_fx.exporters.cusparselt_reader import CUSPARSELT, NEUTRAL, decode, layouts, read
from spp_fx.exporters.format import ROUND_TO, ROUNDED, ExportSettings, Format, Say, Source, Tick, register
from spp_fx.exporters.manifest import TensorRecord, read_manifest
from spp_fx.exporters.packed_reader import DENSE, WEIGHTS
from spp_fx.exporters.packed_writer import (
    Allocate,
    Buffers,
    count_reasons,
    holds,
    read_back,
    refuse_nothing_packed,
    refuse_quantized,
    sizes,
    write_weights,
)
from spp_fx.exporters.semi_structured import can_pack
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.pattern import NM
from spp_fx.storage.safetensors import torch_dtype

DOCUMENTED_FOR = "cuSPARSELt 0.6 to 0.8"
"""The versions that the public kernels were written for, from which the order of a pack is known."""
NOT_2_4 = "it is not 2:4"
STACK = "it is a stack of matrices, the library takes one matrix"


def choose_layout(source: Source, entry: LockEntry, sm: int) -> tuple[str, str | None]:
    """How a weight is stored for this SM, and why not packed if it is not."""
    if len(entry.shape) != 2:
        return DENSE, STACK
    if not holds(source, entry, NM(2, 4)):
        return DENSE, NOT_2_4
    dtype = torch_dtype(source.dtype(entry.name))
    reason = refusal(entry.shape, dtype, sm)
    if reason is None:
        return CUSPARSELT, None
    return (NEUTRAL if can_pack(dtype) else DENSE), reason


def plan(source: Source, sm: int) -> dict[str, TensorRecord]:
    """The record of every site, as it is to be stored."""
    return {
        entry.name: source.record(entry, *choose_layout(source, entry, sm)) for entry in source.lock.sites
    }


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    if settings.sm < 70:
        raise UsageError(f"--sm takes a compute capability from 70 up, such as 80 or 90, got {settings.sm}")
    refuse_quantized(source, "cusparselt")
    sm = settings.sm
    records = plan(source, sm)
    if all(record.layout == DENSE for record in records.values()):
        refuse_nothing_packed(source, records.values(), "cuSPARSELt takes 2:4 matrices alone")
    records = write_weights(source, target / WEIGHTS, records, layouts(sm), allocate(sm), tick)
    source.copy_small_files(target)
    counts = Counter(record.layout for record in records.values())
    if not counts[CUSPARSELT]:
        reasons = count_reasons(records.values())
        say(f"warning: no weight could be packed for sm{sm}: {reasons}{_hint(records, settings)}")
    source.finish(
        target,
        "cusparselt",
        source.lock,
        list(records.values()),
        requirements={
            "sm": sm,
            "layout_documented_for": DOCUMENTED_FOR,
            "alg_id": 0,
            "order": ORDER.get(sm, UNKNOWN_ORDER),
        },
        sizes=sizes(records.values(), layouts(sm), target / WEIGHTS),
    )
    manifest = read_manifest(target, check_files=False)
    checks = read_back(source, target, manifest, layouts(sm), say)
    return {name: counts[name] for name in (CUSPARSELT, NEUTRAL, DENSE)} | checks


def allocate(sm: int) -> Allocate:
    """What the sites of an export are packed into, for `packed_writer`."""

    def buffers(record: TensorRecord, parts: dict[str, Tensor]) -> Buffers:
        m, k = record.shape
        if record.layout == NEUTRAL:

            def copy(positions: Tensor, first_row: int) -> None:
                parts["positions"][first_row : first_row + len(positions)] = positions

            return Buffers(parts["values"], copy, step=1)
        values, meta = views(parts["packed"])
        known: Sm = 90 if sm == 90 else 80

        def order(positions: Tensor, first_row: int) -> None:
            fill(positions, meta, first_row, (m, k), known)

        return Buffers(values, order, BLOCK[known])

    return buffers


def _hint(records: dict[str, TensorRecord], settings: ExportSettings) -> str:
    """The first change of options that would pack weights, and how many; empty where none would."""
    if settings.sm // 10 not in [sm // 10 for sm in BLOCK]:
        return ""  # a pack for another generation of GPUs would never be used
    others = [sm for sm in (settings.sm, *BLOCK) if sm in BLOCK]
    tries = [replace(settings, sm=sm, dtype=dtype) for sm in others for dtype in (settings.dtype, "bfloat16")]
    for tried in tries:
        count = sum(
            record.reason not in (NOT_2_4, STACK)
            and refusal(tuple(record.shape), _dtype(record, tried.dtype), tried.sm) is None
            for record in records.values()
        )
        if count:
            words = [f"--dtype {tried.dtype}"] * (tried.dtype != settings.dtype)
            words += [f"--sm {tried.sm}"] * (tried.sm != settings.sm)
            return f"; {' '.join(words)} would pack {count} of them"
    return ""


def _dtype(record: TensorRecord, rounded_to: str | None) -> torch.dtype:
    """What a site's dtype would be with another `--dtype`."""
    if rounded_to is not None and record.dtype in ROUNDED:
        return ROUND_TO[rounded_to]
    return torch_dtype(record.dtype)


FORMAT = register(Format("cusparselt", write, read, frozenset({"sm", "dtype"}), decode))
