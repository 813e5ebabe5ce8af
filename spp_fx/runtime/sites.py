"""Which weights of an export can run packed, and their packs as they are stored."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from spp_fx.checkpoint import Shard, torch_dtype
from spp_fx.errors import FormatError
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord
from spp_fx.runtime.trust import PackedSite
from spp_fx.runtime.weights import StoredWeights, owner_of

PARTS: Final[dict[str, tuple[str, ...]]] = {
    "cusparselt": ("packed",),
    "neutral": (),
    "cutlass": ("packed", "meta"),
}
"""The layouts that a library has a product for, and the stored tensors of a pack, NAME.PART."""


def dense_reason(record: TensorRecord, name: str | None, stored: StoredWeights) -> str | None:
    """Why a weight cannot run packed whatever the GPU; None where it can."""
    if record.layout not in PARTS:
        return record.reason or f"it is stored as {record.layout}, which no library multiplies by"
    if name is None:
        return "it is part of a stack, the libraries take one matrix"
    owner, attribute = owner_of(stored.model, name)
    if type(owner).forward is not nn.Linear.forward or attribute != "weight" or record.transposed:
        return f"its module is a {type(owner).__name__}, no plain linear"
    others = next(names for names in stored.shared if name in names)
    if len(others) > 1:
        return f"it is shared by {' and '.join(others)}"
    dtype = stored.dtypes[name]
    if dtype != torch_dtype(record.dtype):
        return f"it is packed as {record.dtype}, the model computes in {str(dtype).removeprefix('torch.')}"
    return None


def packed_site(
    record: TensorRecord,
    name: str,
    stored: StoredWeights,
    shard: Callable[[], Shard],
    manifest: Manifest,
    device: torch.device,
) -> PackedSite:
    parts = PARTS[record.layout]
    sm = manifest.requirements.get("sm")
    if sm is not None and not isinstance(sm, int):
        raise FormatError(f"{stored.folder / MANIFEST}: requirements.sm: {sm!r} is no number")

    def read_parts() -> dict[str, Tensor]:
        tensors = {part: shard().read(f"{record.name}.{part}") for part in parts}
        return {part: tensor.to(device) for part, tensor in tensors.items()}

    m, k = record.shape
    return PackedSite(
        name=record.name,
        shape=(m, k),
        dtype=torch_dtype(record.dtype),
        layout=f"{record.layout} of spp-fx {manifest.spp_fx_version}",
        sm=sm,
        unpacked=None if parts else record.reason or "the export holds no pack of it, only the neutral form",
        parts=read_parts,
        dense=lambda: stored.read(name, device),
    )
