"""Reading a cusparselt export back; packs are decoded by tables of their own, not by the writer's code.

The metadata of a pack is a line of nibbles, one a group of four columns. `nibble_places` says where the
nibble of each group stands, from the published offsets as they are written down: tile by tile and unit by
unit. `cusparselt_layout`, which writes packs, never computes an offset but permutes axes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.checkpoint import Shard, TensorInfo, torch_dtype
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.cusparselt_layout import Sm, refusal
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord
from spp_fx.exporters.registry import Weights
from spp_fx.exporters.semi_structured import Packed24, unpack_2_4
from spp_fx.exporters.source import scan_stored
from spp_fx.sparsity import Scan, scan_tensor

Layout = Literal["cusparselt", "neutral", "dense"]
PARTS: Final[dict[Layout, tuple[str, ...]]] = {
    "cusparselt": ("packed", "values", "positions"),
    "neutral": ("values", "positions"),
    "dense": (),
}
WEIGHTS = "model.safetensors"

_ROWS = 128  # rows decoded at a time

# sm80: the 64 units of a 32 x 32 tile; a unit is 16 columns of one row, four nibbles.
_UNIT_IN_TILE = np.zeros((32, 2), dtype=np.int64)
for _r in range(8):
    for _place, (_down, _half) in enumerate(
        [(0, 0), (8, 0), (0, 1), (8, 1), (16, 0), (24, 0), (16, 1), (24, 1)]
    ):
        _UNIT_IN_TILE[_r + _down, _half] = 8 * _r + _place

# sm90: where each of the eight groups of 32 columns stands in the 8 bytes of a row.
_BYTE_OF_GROUP = np.array([[0, 4, 1, 5, 2, 6, 3, 7].index(group) for group in range(8)])


def nibble_places(rows: npt.NDArray[np.int64], m: int, k: int, sm: Sm) -> npt.NDArray[np.int64]:
    """Where the nibbles of some rows stand in the metadata of an (m, k) pack: (rows, k/4), in nibbles."""
    row, group = rows[:, None], np.arange(k // 4)[None, :]
    column = 4 * group
    if sm == 80:
        tile = (
            row // 128 * 512
            + column // 64 * 512 * (m // 128)
            + row % 128 // 32 * 64
            + column % 64 // 32 * 256
        )
        return 4 * (tile + _UNIT_IN_TILE[row % 32, column % 32 // 16]) + group % 4
    block = row // 64 * 8 * k + column // 32 * 256 + row % 64 // 16 * 64
    return 2 * (block + 8 * (row % 8) + _BYTE_OF_GROUP[group % 8]) + row % 16 // 8


def unpack(packed: Tensor, shape: tuple[int, int], sm: Sm) -> Tensor:
    """The dense weight of a packed tensor, bit for bit.

    Args:
        packed: (m, 9k/16), or flat as older PyTorch has it, float16 or bfloat16.
        shape: (m, k) of the dense weight.
        sm: the GPU the pack is for.

    Returns:
        (m, k) of packed's dtype.

    Raises:
        UsageError: the order is not known for this shape, dtype or GPU.
        FormatError: the size does not fit the shape, or a metadata nibble is not idx0 < idx1.
    """
    m, k = shape
    if reason := refusal(shape, packed.dtype, sm):
        raise UsageError(f"cannot unpack: {reason}")
    if packed.dim() not in (1, 2) or packed.numel() != m * 9 * k // 16:
        raise FormatError(
            f"packed tensor has shape {tuple(packed.shape)}, a weight of {m} x {k} needs ({m}, {9 * k // 16})"
        )
    stored: npt.NDArray[Any] = packed.detach().cpu().reshape(-1).view(torch.int16).numpy()
    values = stored[: m * k // 2].reshape(m, k // 4, 2)
    meta = stored[m * k // 2 :].view(np.uint8)
    nibbles = np.stack((meta & 0xF, meta >> 4), axis=1).reshape(-1)
    dense = np.zeros((m, k // 4, 4), dtype=np.int16)
    for start in range(0, m, _ROWS):
        rows = np.arange(start, min(start + _ROWS, m))
        found = nibbles[nibble_places(rows, m, k, sm)]
        first, second = found & 3, found >> 2
        if (first >= second).any():
            row, group = (int(i) for i in np.argwhere(first >= second)[0])
            raise FormatError(
                f"row {start + row}, columns {4 * group}-{4 * group + 3} have the position nibble "
                f"0x{int(found[row, group]):X}, which is not idx0 | idx1 << 2 with idx0 < idx1"
            )
        for slot, position in enumerate((first, second)):
            for column in range(4):
                at = position == column
                dense[start : start + _ROWS, :, column][at] = values[start : start + _ROWS, :, slot][at]
    return torch.from_numpy(dense.reshape(m, k)).view(packed.dtype)


def part_specs(
    name: str, shape: tuple[int, int], dtype: str, layout: Layout
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that store a site."""
    m, k = shape
    forms = {
        "packed": (dtype, (m, 9 * k // 16)),
        "values": (dtype, (m, k // 2)),
        "positions": ("U8", (m, -(-k // 8))),
    }
    return [(f"{name}.{part}", *forms[part]) for part in PARTS[layout]]


def layout_of(record: TensorRecord, sm: Sm, where: str) -> Layout:
    """A record's layout, once its other fields are known to go with it.

    Raises:
        FormatError: names `where` and the field.
    """
    if record.layout not in PARTS:
        raise FormatError(f"{where}.layout: '{record.layout}', expected one of {', '.join(PARTS)}")
    if record.layout != "dense" and (len(record.shape) != 2 or record.shape[1] % 4):
        raise FormatError(f"{where}.shape: {record.shape} is no matrix of whole groups of four")
    try:
        dtype = torch_dtype(record.dtype)
    except FormatError as error:
        raise FormatError(f"{where}.dtype: {error}") from None
    if record.layout == "cusparselt" and (reason := refusal(tuple(record.shape), dtype, sm)):
        raise FormatError(f"{where}.layout: 'cusparselt', which cannot be: {reason}")
    return record.layout


def sm_of(manifest: Manifest, path: Path) -> Sm:
    """The SM that a manifest's packs are made for; `path` is the manifest's own."""
    sm = manifest.requirements.get("sm")
    if sm not in (80, 90):
        raise FormatError(f"{path}: requirements.sm: {sm!r}, expected 80 or 90")
    return 90 if sm == 90 else 80


def read_weight(shard: Shard, record: TensorRecord, layout: Layout, sm: Sm) -> Tensor:
    """A site's canonical weight, decoded from every form it is stored in; they must agree to the bit.

    Raises:
        FormatError: a part is missing or of a wrong shape, or the pack says another weight than the
            neutral form.
    """
    if layout == "dense":
        _find(shard, record.name)
        stored = shard.read(record.name)
        return stored.transpose(-1, -2) if record.transposed else stored
    m, k = record.shape
    for part, dtype, shape in part_specs(record.name, (m, k), record.dtype, layout):
        info = _find(shard, part)
        if info.dtype != dtype or info.shape != shape:
            raise FormatError(
                f"{shard.path}: {part} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    values, positions = (shard.read(f"{record.name}.{part}") for part in ("values", "positions"))
    neutral = unpack_2_4(Packed24(values, positions), k)
    if layout == "neutral":
        return neutral
    packed = unpack(shard.read(f"{record.name}.packed"), (m, k), sm)
    differing = bits(neutral) != bits(packed)
    if bool(differing.any()):
        row, column = divmod(int(differing.flatten().to(torch.uint8).argmax()), k)
        raise FormatError(
            f"{shard.path}: {record.name}: row {row}, column {column}: the packed form says another value "
            "than the layout-neutral one"
        )
    return neutral


def _find(shard: Shard, name: str) -> TensorInfo:
    info = shard.header.tensors.get(name)
    if info is None:
        raise FormatError(f"{shard.path}: holds no tensor {name}, {MANIFEST} says it does")
    return info


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers of their width."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def read_sites(folder: Path, manifest: Manifest) -> Iterator[tuple[TensorRecord, Tensor]]:
    """Every site of an export with its canonical weight."""
    shard, sm = Shard.open(folder / WEIGHTS), sm_of(manifest, folder / MANIFEST)
    for index, record in enumerate(manifest.tensors):
        layout = layout_of(record, sm, f"{folder / MANIFEST}: tensors.{index}")
        yield record, read_weight(shard, record, layout, sm)


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export, decoded from every form that they are stored in."""
    path = folder / MANIFEST
    shard, sm = Shard.open(folder / WEIGHTS), sm_of(manifest, path)
    records = {record.name: record for record in manifest.tensors}
    layouts: dict[str, Layout] = {
        record.name: layout_of(record, sm, f"{path}: tensors.{index}")
        for index, record in enumerate(manifest.tensors)
    }

    def scan(name: str, transposed: bool) -> Scan:
        record, layout = records[name], layouts[name]
        if layout == "dense":
            _find(shard, name)
            return scan_stored(shard, name, transposed=transposed)
        return scan_tensor(read_weight(shard, record, layout, sm))

    sites = {name: record.transposed for name, record in records.items()}
    return Weights(frozenset(records), scan, lambda _: shard.name, lambda: sites)
