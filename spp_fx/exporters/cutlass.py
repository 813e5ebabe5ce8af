"""cutlass: sparse weights as PyTorch's CUTLASS kernels take them, for GPUs of compute capability 8.x.

The packed files of the export (see `packed`) hold two tensors for each site NAME, `packed` and `meta` of
`torch.sparse.SparseSemiStructuredTensorCUTLASS` (see `cutlass_layout`), and every other tensor of the model as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.exporters.cutlass_layout import FORMS, fill, neutral_form, refusal
from spp_fx.exporters.format import Decoded, Format, RoundTo, Say, Source, Tick, register
from spp_fx.exporters.manifest import Manifest
from spp_fx.exporters.packed import (
    DENSE,
    Layout,
    PackedModel,
    Packing,
    Rows,
    decoded_rows,
    holds,
    plan,
    write_packed,
)
from spp_fx.options import option
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.pattern import NM
from spp_fx.storage.safetensors import dtype_name, torch_dtype

CUTLASS = "cutlass"
REQUIREMENTS: dict[str, int | str] = {
    "compute_capability": "8.x",
    "layout_documented_for": "PyTorch 2.11 to 2.15, torch.sparse.SparseSemiStructuredTensorCUTLASS",
    "order": "proven: it is that of torch/sparse/_semi_structured_conversions.py",
}


@register("cutlass")
@dataclass(frozen=True)
class Cutlass(Format):
    """2:4 packed for PyTorch's CUTLASS kernels."""

    dtype: RoundTo | None = option(None, "Round the weights to this type.")

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        takes = "CUTLASS takes only 2:4 matrices (float32: 1:2)"
        records = plan(source, choose_layout, takes)
        return write_packed(source, folder, CUTLASS, records, LAYOUTS, REQUIREMENTS, tick, say)

    @classmethod
    def decode(cls, folder: Path, manifest: Manifest) -> Decoded:
        return PackedModel.open(folder, manifest, LAYOUTS).decoded()


def choose_layout(source: Source, entry: LockEntry) -> tuple[str, str | None]:
    """The layout of a site, and why it is dense."""
    dtype = torch_dtype(source.dtype(entry.name))
    if len(entry.shape) != 2:
        return DENSE, "it is a stack of matrices, the kernels take one matrix"
    if reason := refusal(entry.shape, dtype):
        return DENSE, reason
    if FORMS[dtype].group == 4:
        return (CUTLASS, None) if holds(source, entry, NM(2, 4)) else (DENSE, "it is not 2:4")
    if holds(source, entry, NM(1, 2)):
        return CUTLASS, None
    if holds(source, entry, NM(2, 4)):
        return DENSE, "float32 is 1:2 sparse on tensor cores and it is 2:4: --dtype bfloat16 packs it"
    return DENSE, "it is not 1:2"


def _parts(shape: tuple[int, int], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    (m, k), form = shape, FORMS[torch_dtype(dtype)]
    return {"packed": (dtype, (m, k // 2)), "meta": (dtype_name(form.meta), (m, k // form.columns))}


def _packing(dtype: torch.dtype) -> Packing:
    form = FORMS[dtype]

    def order(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        fill(positions, metadata.view(form.meta).view(shape[0], shape[1] // form.columns), first_row)

    return Packing(order, form.rows, form.group)


def _rows(parts: list[Tensor], shape: tuple[int, int]) -> Rows:
    packed, meta = parts
    return decoded_rows(neutral_form(packed, meta), FORMS[packed.dtype].group)


LAYOUTS = {CUTLASS: Layout(_parts, refusal, _packing, _rows)}
