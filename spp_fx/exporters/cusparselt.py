"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt.

The packed files of the export (see `packed`) hold, for each site NAME of m rows and k columns, by its layout:

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

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.exporters.cusparselt_layout import BLOCK, ORDER, UNKNOWN_ORDER, Sm, fill, refusal
from spp_fx.exporters.cusparselt_reader import CUSPARSELT, NEUTRAL, decode, layouts, read
from spp_fx.exporters.format import ROUND_TO, ROUNDED, ExportSettings, Format, Say, Source, Tick, register
from spp_fx.exporters.manifest import TensorRecord
from spp_fx.exporters.packed import DENSE, Packing, count_reasons, holds, plan, write_packed
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.packing import can_pack
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


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    sm = settings.sm
    if sm < 70:
        raise UsageError(f"--sm takes a compute capability from 70 up, such as 80 or 90, got {sm}")
    takes = "cuSPARSELt takes 2:4 matrices"
    records = plan(source, lambda entry: choose_layout(source, entry, sm), takes)
    if all(record.layout != CUSPARSELT for record in records.values()):
        reasons = count_reasons(records.values())
        say(f"warning: no weight could be packed for sm{sm}: {reasons}{_hint(records, settings)}")
    requirements: dict[str, int | str] = {
        "sm": sm,
        "layout_documented_for": DOCUMENTED_FOR,
        "alg_id": 0,
        "order": ORDER.get(sm, UNKNOWN_ORDER),
    }
    pack = partial(packing, sm=sm)
    return write_packed(source, target, CUSPARSELT, records, layouts(sm), pack, requirements, tick, say)


def packing(record: TensorRecord, sm: int) -> Packing:
    """How a site is packed for an SM."""
    known: Sm = 90 if sm == 90 else 80

    def order(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        fill(positions, metadata, first_row, shape, known)

    def copy(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        metadata.view(shape[0], positions.shape[1])[first_row : first_row + len(positions)] = positions

    return Packing(order, BLOCK[known]) if record.layout == CUSPARSELT else Packing(copy, 1)


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
