"""cutlass: sparse weights in the form of PyTorch's CUTLASS kernels, for GPUs of compute capability 8.x.

The packed files of the export (see `packed`) hold, for each site NAME of m rows and k columns:

| tensor      | 16-bit         | int8           | float32 (1:2) | what                                           |
|-------------|----------------|----------------|---------------|------------------------------------------------|
| NAME.packed | [m, k/2]       | [m, k/2]       | [m, k/2]      | the kept entries, of the weight's dtype        |
| NAME.meta   | [m, k/16] int16| [m, k/32] int32| [m, k/8] int16| their positions in CUTLASS' order              |

and every other tensor of the model as it is. They are `packed` and `meta` of
`torch.sparse.SparseSemiStructuredTensorCUTLASS`; see `cutlass_layout`. A weight that it cannot take stays
dense, and its record says why. The form gives the weight back bit for bit, but for negative zeros that have
no slot: `cutlass_reader.neutral_form`.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from spp_fx.exporters.cutlass_layout import FORMS, fill, refusal
from spp_fx.exporters.cutlass_reader import CUTLASS, LAYOUTS, decode, read
from spp_fx.exporters.format import ExportSettings, Format, Say, Source, Tick, register
from spp_fx.exporters.manifest import TensorRecord
from spp_fx.exporters.packed import DENSE, Packing, holds, plan, write_packed
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.pattern import NM
from spp_fx.storage.safetensors import torch_dtype

REQUIREMENTS: dict[str, int | str] = {
    "compute_capability": "8.x",
    "layout_documented_for": "PyTorch 2.11 to 2.15, torch.sparse.SparseSemiStructuredTensorCUTLASS",
    "order": "proven: it is that of torch/sparse/_semi_structured_conversions.py",
}
"""What the packs of an export are for: PyTorch's kernels refuse any other compute capability."""


def choose_layout(source: Source, entry: LockEntry) -> tuple[str, str | None]:
    """How a weight is stored, and why not packed if it is not."""
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


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    del settings
    takes = "CUTLASS takes 2:4 matrices (float32: 1:2)"
    records = plan(source, lambda entry: choose_layout(source, entry), takes)
    return write_packed(source, target, CUTLASS, records, LAYOUTS, packing, REQUIREMENTS, tick, say)


def packing(record: TensorRecord) -> Packing:
    """How a site is packed."""
    form = FORMS[torch_dtype(record.dtype)]

    def order(positions: Tensor, metadata: Tensor, first_row: int, shape: tuple[int, int]) -> None:
        fill(positions, metadata.view(form.meta).view(shape[0], shape[1] // form.columns), first_row)

    return Packing(order, form.rows, form.group)


FORMAT = register(Format("cutlass", write, read, frozenset({"dtype"}), decode))
