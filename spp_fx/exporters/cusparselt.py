"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt.

The packed files of the export (see `packed`) hold, for each site NAME of m rows and k columns, by its layout:

| layout     | tensor         | shape          | dtype        | what                                               |
|------------|----------------|----------------|--------------|----------------------------------------------------|
| cusparselt | NAME.packed    | [m, 9k/16]     | the weight's | values and metadata, see `cusparselt_layout`       |
| neutral    | NAME.values    | [m, k/2]       | the weight's | the two kept entries of each group of four         |
| neutral    | NAME.positions | [m, ceil(k/8)] | uint8        | two groups a byte, low nibble first, idx0, idx1<<2 |

and every other tensor of the model as it is. A 2:4 weight for which no pack is made ahead (of another SM, dtype or
shape) has the neutral form, which is packed when it is loaded.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.cusparselt_layout import BLOCK, Sm, fill, neutral_form, refusal
from spp_fx.exporters.format import (
    ROUND_TO,
    ROUNDED,
    Decoded,
    Format,
    RoundTo,
    Say,
    Source,
    Tick,
    register,
)
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord
from spp_fx.exporters.packed import (
    DENSE,
    Layout,
    PackedModel,
    Packing,
    decoded_rows,
    holds,
    plan,
    write_packed,
)
from spp_fx.options import option
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.packing import Packed24, can_pack
from spp_fx.sparsity.pattern import NM
from spp_fx.storage.safetensors import torch_dtype

CUSPARSELT, NEUTRAL = "cusparselt", "neutral"
OLDEST_SM = 70
NOT_2_4 = "it is not 2:4"
STACK = "it is a stack of matrices, the library takes one matrix"

#: Where the metadata order of an SM is known from.
ORDER: Final[dict[int, str]] = {
    80: "that of PyTorch's public kernels, not compared with the library here",
    90: "that of torchao's kernels, in bfloat16 byte for byte the library's own on an H100 (0.8.0)",
}


def _compute_capability(sm: int) -> str | None:
    return None if sm >= OLDEST_SM else f"must be a compute capability from {OLDEST_SM} up, such as 80 or 90"


@register("cusparselt")
@dataclass(frozen=True)
class CuSparseLt(Format):
    """2:4 packed for cuSPARSELt."""

    sm: int = option(
        80,
        "GPU that weights are packed for: 80 Ampere, 90 Hopper; others are packed when they are loaded.",
        _compute_capability,
    )
    dtype: RoundTo | None = option(None, "Round the weights to this type.")

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        records = plan(source, partial(choose_layout, sm=self.sm), "cuSPARSELt takes only 2:4 matrices")
        if all(record.layout != CUSPARSELT for record in records.values()):
            neutral = sum(record.layout == NEUTRAL for record in records.values())
            say(  # the result lists the reasons
                f"warning: no weight could be packed for sm{self.sm} ({neutral} of {len(records)} have the layout "
                f"neutral){self._hint(records)}"
            )
        requirements: dict[str, int | str] = {
            "sm": self.sm,
            "layout_documented_for": "cuSPARSELt 0.6 to 0.8",
            "alg_id": 0,
            "order": ORDER.get(self.sm, "unknown: nothing is packed ahead"),
        }
        return write_packed(source, folder, CUSPARSELT, records, layouts(self.sm), requirements, tick, say)

    @classmethod
    def decode(cls, folder: Path, manifest: Manifest) -> Decoded:
        sm = manifest.requirements.get("sm")
        if not isinstance(sm, int) or sm < OLDEST_SM:
            raise FormatError(
                f"{folder / MANIFEST}: requirements.sm: {sm!r}, expected an integer from {OLDEST_SM} up"
            )
        return PackedModel.open(folder, manifest, layouts(sm)).decoded()

    def _hint(self, records: dict[str, TensorRecord]) -> str:
        """The first change of options that would pack weights, and how many; empty where none would."""
        if self.sm // 10 not in [sm // 10 for sm in BLOCK]:
            return ""  # a pack for another generation of GPUs would never be used
        others = [sm for sm in (self.sm, *BLOCK) if sm in BLOCK]
        for tried in [
            replace(self, sm=sm, dtype=dtype) for sm in others for dtype in (self.dtype, "bfloat16")
        ]:
            count = sum(
                record.reason not in (NOT_2_4, STACK)
                and refusal(tuple(record.shape), tried._dtype(record), tried.sm) is None
                for record in records.values()
            )
            if count:
                words = [f"--dtype {tried.dtype}"] * (tried.dtype != self.dtype)
                words += [f"--sm {tried.sm}"] * (tried.sm != self.sm)
                return f"; {' '.join(words)} would pack {count} of them"
        return ""

    def _dtype(self, record: TensorRecord) -> torch.dtype:
        """The dtype that a site would have with these options."""
        if self.dtype is not None and record.dtype in ROUNDED:
            return ROUND_TO[self.dtype]
        return torch_dtype(record.dtype)


def choose_layout(source: Source, entry: LockEntry, sm: int) -> tuple[str, str | None]:
    """The layout of a site for an SM, and why it is not packed."""
    if len(entry.shape) != 2:
        return DENSE, STACK
    if not holds(source, entry, NM(2, 4)):
        return DENSE, NOT_2_4
    dtype = torch_dtype(source.dtype(entry.name))
    reason = refusal(entry.shape, dtype, sm)
    if reason is None:
        return CUSPARSELT, None
    return (NEUTRAL if can_pack(dtype) else DENSE), reason


def layouts(sm: int) -> dict[str, Layout]:
    """The layouts of packs for an SM."""
    known: Sm = 90 if sm == 90 else 80

    def order(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        fill(positions, metadata, first_row, shape, known)

    def copy(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        metadata.view(shape[0], positions.shape[1])[first_row : first_row + len(positions)] = positions

    packed = Layout(
        parts=lambda shape, dtype: {"packed": (dtype, (shape[0], 9 * shape[1] // 16))},
        refusal=lambda shape, dtype: refusal(shape, dtype, sm),
        packing=lambda dtype: Packing(order, BLOCK[known]),
        rows=lambda parts, shape: decoded_rows(neutral_form(parts[0], shape, known)),
    )
    neutral = Layout(
        parts=lambda shape, dtype: {
            "values": (dtype, (shape[0], shape[1] // 2)),
            "positions": ("U8", (shape[0], -(-shape[1] // 8))),
        },
        refusal=lambda shape, dtype: None if can_pack(dtype) else f"{dtype} has no packed form",
        packing=lambda dtype: Packing(copy),
        rows=lambda parts, shape: decoded_rows(Packed24(*parts)),
    )
    return {CUSPARSELT: packed, NEUTRAL: neutral}
