"""Reading cutlass exports: packs are decoded by a table of offsets, which `cutlass_layout` never computes.

`nibble_indices` says where the nibble of each group is in the metadata, step by step as CUTLASS' `reorder_meta`
and `ColumnMajorInterleaved<2>` are written down. Everything is read as integers: no float operation can touch
a NaN.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.cutlass_layout import FORMS, refusal
from spp_fx.exporters.format import Decoded
from spp_fx.exporters.manifest import Manifest, TensorRecord
from spp_fx.exporters.packed import Indices, Layouts, PackedModel, Rows, decoded_rows, gather
from spp_fx.sparsity.packing import Packed24
from spp_fx.sparsity.weights import Weights
from spp_fx.storage.safetensors import Shard, dtype_name, torch_dtype

CUTLASS = "cutlass"


def nibble_indices(m: int, groups: int, meta: torch.dtype) -> tuple[Indices, Indices]:
    """Where nibbles are in the metadata of m rows: that of group j of row i at rows[i] + groups[j].

    Args:
        m, groups: rows, and groups (or pairs) a row.
        meta: int16, units of four nibbles, or int32, units of eight.

    Returns:
        rows (m,) and groups (groups,), in nibbles.
    """
    nibbles = 2 * meta.itemsize
    height, apart = (32, 4) if meta == torch.int16 else (16, 2)
    row, group = np.arange(m), np.arange(groups)
    # Rows r, r + 8, ... of a tile are put together.
    row = row // height * height + row % 8 * apart + row % height // 8
    # Column-major, two columns interleaved: unit (row, column) at column // 2 * 2 m + 2 row + column % 2, once
    # the top right and the bottom left of every 2 x 2 units are swapped: then an odd row adds 1 in
    # them, and an odd column 2.
    column = group // nibbles
    below = 2 * (row - row % 2) + row % 2
    beside = column // 2 * 2 * m + 2 * (column % 2)
    return nibbles * below, nibbles * beside + group % nibbles


def neutral_form(packed: Tensor, meta: Tensor) -> Packed24:
    """The layout-neutral form (of float32 the 1:2 one) of the two tensors of a weight.

    Args:
        packed: (m, k/2) float16, bfloat16, int8 or float32.
        meta: as `cutlass_layout` has it for that dtype.

    Raises:
        UsageError: PyTorch's class takes no such weight.
        FormatError: meta is of another dtype or shape.
    """
    m, k = packed.shape[0], 2 * packed.shape[1]
    if reason := refusal((m, k), packed.dtype):
        raise UsageError(f"cannot unpack: {reason}")
    form = FORMS[packed.dtype]
    if meta.dtype != form.meta or meta.shape != (m, k // form.columns):
        raise FormatError(
            f"metadata is {meta.dtype} of shape {tuple(meta.shape)}, a weight of {m} x {k} needs "
            f"{form.meta} of shape ({m}, {k // form.columns})"
        )
    positions = gather(meta.detach().cpu().contiguous(), *nibble_indices(m, k // form.group, form.meta))
    return Packed24(packed.detach().cpu(), positions)


def unpack(packed: Tensor, meta: Tensor) -> Tensor:
    """The dense weight (m, k) of its two tensors, bit for bit; arguments and errors as for `neutral_form`.

    Raises:
        FormatError: also where a nibble is none.
    """
    return _rows(packed, meta)(0, packed.shape[0])


def _rows(packed: Tensor, meta: Tensor) -> Rows:
    return decoded_rows(neutral_form(packed, meta), FORMS[packed.dtype].group)


def _stored_rows(shard: Shard, record: TensorRecord) -> Rows:
    return _rows(shard.read(f"{record.name}.packed"), shard.read(f"{record.name}.meta"))


def _parts(shape: tuple[int, int], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    (m, k), form = shape, FORMS[torch_dtype(dtype)]
    return {"packed": (dtype, (m, k // 2)), "meta": (dtype_name(form.meta), (m, k // form.columns))}


def _impossible(record: TensorRecord) -> str | None:
    return refusal(tuple(record.shape), torch_dtype(record.dtype))


LAYOUTS = Layouts({CUTLASS: _parts}, _impossible, _stored_rows)


def open_packs(folder: Path, manifest: Manifest) -> PackedModel:
    """A cutlass export, its manifest checked."""
    return PackedModel.open(folder, manifest, LAYOUTS)


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export, decoded."""
    return open_packs(folder, manifest).weights()


def decode(folder: Path, manifest: Manifest) -> Decoded:
    """The model's tensors."""
    return open_packs(folder, manifest).decoded()
