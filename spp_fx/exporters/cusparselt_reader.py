"""Reading cusparselt exports: packs are decoded by a table of offsets, not by the writer's code.

The metadata of a pack is a line of nibbles, one a group of four columns. `nibble_indices` says where the nibble
of each group is, from the published offsets as they are written down. `cusparselt_layout`, which writes packs,
never computes an offset but permutes axes.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.cusparselt_layout import Sm, refusal
from spp_fx.exporters.format import Decoded
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord
from spp_fx.exporters.packed import Indices, Layouts, PackedModel, Rows, decoded_rows, gather
from spp_fx.sparsity.packing import Packed24, can_pack, unpack_2_4
from spp_fx.sparsity.weights import Weights
from spp_fx.storage.safetensors import Shard, torch_dtype

CUSPARSELT, NEUTRAL = "cusparselt", "neutral"

# sm80: in a 32 x 32 tile of 64 units (a unit is 16 columns of one row, four nibbles) the eight units of
# r are (r, 0) (r+8, 0) (r, 1) (r+8, 1) (r+16, 0) (r+24, 0) (r+16, 1) (r+24, 1).
_UNIT_OF_ROW = np.array([8 * (row % 8) + {0: 0, 8: 1, 16: 4, 24: 5}[row // 8 * 8] for row in range(32)])
_UNIT_OF_HALF = np.array([0, 2])

# sm90: which of the 8 bytes of a row holds each of the eight groups of 32 columns.
_BYTE_OF_GROUP = np.array([[0, 4, 1, 5, 2, 6, 3, 7].index(group) for group in range(8)])


def nibble_indices(m: int, k: int, sm: Sm) -> tuple[Indices, Indices]:
    """Where nibbles are in the metadata of an (m, k) pack: that of group j of row i at rows[i] + groups[j].

    Returns:
        rows (m,) and groups (k/4,), in nibbles.
    """
    row, group = np.arange(m), np.arange(k // 4)
    column = 4 * group
    if sm == 80:
        below = row // 128 * 512 + row % 128 // 32 * 64 + _UNIT_OF_ROW[row % 32]
        beside = column // 64 * 512 * (m // 128) + column % 64 // 32 * 256 + _UNIT_OF_HALF[column % 32 // 16]
        return 4 * below, 4 * beside + group % 4
    below = row // 64 * 8 * k + row % 64 // 16 * 64 + 8 * (row % 8)
    return 2 * below + row % 16 // 8, 2 * (column // 32 * 256 + _BYTE_OF_GROUP[group % 8])


def neutral_form(packed: Tensor, shape: tuple[int, int], sm: Sm) -> Packed24:
    """The layout-neutral form of a packed tensor, from which it can be packed for any other GPU.

    Args:
        packed: (m, 9k/16), or flat as older PyTorch has it, float16 or bfloat16.
        shape: (m, k) of the dense weight.
        sm: the GPU the pack is for.

    Returns:
        values, a view of packed where that is on the CPU, and positions.

    Raises:
        UsageError: the order is not known for this shape, dtype or GPU.
        FormatError: the size does not fit the shape.
    """
    m, k = shape
    if reason := refusal(shape, packed.dtype, sm):
        raise UsageError(f"cannot unpack: {reason}")
    if packed.dim() not in (1, 2) or packed.numel() != m * 9 * k // 16:
        raise FormatError(
            f"packed tensor has shape {tuple(packed.shape)}, a weight of {m} x {k} needs ({m}, {9 * k // 16})"
        )
    flat = packed.detach().cpu().reshape(-1)
    return Packed24(flat[: m * k // 2].view(m, k // 2), gather(flat[m * k // 2 :], *nibble_indices(m, k, sm)))


def unpack(packed: Tensor, shape: tuple[int, int], sm: Sm) -> Tensor:
    """The dense weight of a packed tensor, bit for bit: (m, k) of packed's dtype.

    Args:
        packed, shape, sm: as for `neutral_form`.

    Raises:
        UsageError, FormatError: as for `neutral_form`; or a metadata nibble is not idx0 < idx1.
    """
    return unpack_2_4(neutral_form(packed, shape, sm), shape[1])


def layouts(sm: int) -> Layouts:
    """The layouts of packs for an SM."""

    def impossible(record: TensorRecord) -> str | None:
        dtype = torch_dtype(record.dtype)
        if record.layout == CUSPARSELT:
            return refusal(tuple(record.shape), dtype, sm)
        return None if can_pack(dtype) else f"{record.dtype} has no packed form"

    def rows(shard: Shard, record: TensorRecord) -> Rows:
        if record.layout == CUSPARSELT:
            m, k = record.shape
            neutral = neutral_form(shard.read(f"{record.name}.packed"), (m, k), _known(sm))
        else:
            values, positions = (shard.read(f"{record.name}.{part}") for part in ("values", "positions"))
            neutral = Packed24(values, positions)
        return decoded_rows(neutral)

    parts = {
        CUSPARSELT: lambda shape, dtype: {"packed": (dtype, (shape[0], 9 * shape[1] // 16))},
        NEUTRAL: lambda shape, dtype: {
            "values": (dtype, (shape[0], shape[1] // 2)),
            "positions": ("U8", (shape[0], -(-shape[1] // 8))),
        },
    }
    return Layouts(parts, impossible, rows)


def _known(sm: int) -> Sm:
    return 90 if sm == 90 else 80


def open_packs(folder: Path, manifest: Manifest) -> PackedModel:
    """A cusparselt export, its manifest checked."""
    sm = manifest.requirements.get("sm")
    if not isinstance(sm, int) or sm < 70:
        raise FormatError(f"{folder / MANIFEST}: requirements.sm: {sm!r}, expected an integer from 70 up")
    return PackedModel.open(folder, manifest, layouts(sm))


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export, decoded."""
    return open_packs(folder, manifest).weights()


def decode(folder: Path, manifest: Manifest) -> Decoded:
    """The model's tensors."""
    return open_packs(folder, manifest).decoded()
