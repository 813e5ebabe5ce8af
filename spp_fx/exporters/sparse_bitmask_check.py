"""Comparing a sparse-bitmask export with its model: read by the safetensors library, decoded by numpy alone."""

from collections.abc import Set
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.checks import NOT_IN_TORCH, LibraryReader, check_copied
from spp_fx.exporters.raw_file import copy_spans
from spp_fx.parallel import in_order
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import Shard

_BLOCK = 1 << 20  # elements decoded at a time


def check_written(model: ModelFolder, folder: Path, packed: Set[str]) -> dict[str, int]:
    """Hold every tensor of compact weight files to the model's, bit for bit.

    Args:
        model: the model.
        folder: compact files under the names of the model's.
        packed: the tensors that are stored as values and bitmask.

    Returns:
        How many tensors were decoded, and how many were compared as they are.

    Raises:
        FormatError: a file or a tensor is not the model's.
    """
    counts, library = {"bit_exact": 0, "tensors_equal": 0}, LibraryReader()
    for shard in model.shards:
        written = within(folder, shard.name)
        with shard.path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        with safe_open(str(written), "pt") as ours:
            if ours.metadata()["header"].encode() != header:
                raise FormatError(f"{written}: does not hold the header of {shard.path}")
        for name in sorted(packed & shard.header.tensors.keys()):
            values, bits = (library.read(written, f"{name}.{part}") for part in ("values", "bitmask"))
            _check_site(values, bits, library.read(shard.path, name), f"{written}: {name}")
            counts["bit_exact"] += 1
        others = [name for name in shard.header.tensors if name not in packed]
        plain = [name for name in others if shard.info(name).dtype not in NOT_IN_TORCH]
        counts["tensors_equal"] += check_copied(model, plain, written)
        counts["tensors_equal"] += _check_bytes(shard, written, [n for n in others if n not in plain])
    return counts


def _check_site(values: Tensor, bits: Tensor, weight: Tensor, where: str) -> None:
    """Where the mask has ones the weight holds the values, and elsewhere nothing."""
    kind = np.dtype(f"<u{weight.element_size()}")
    kept, stored = (t.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind) for t in (values, weight))
    mask = np.asarray(bits.numpy())
    blocks = [(start, min(start + _BLOCK, stored.size)) for start in range(0, stored.size, _BLOCK)]
    counts = [int(np.bitwise_count(mask[a // 8 : -(-b // 8)]).sum(dtype=np.int64)) for a, b in blocks]
    starts = list(accumulate(counts, initial=0))
    if values.dtype != weight.dtype or starts[-1] != kept.size:
        raise FormatError(f"{where}: {kept.size} values of {values.dtype}, {starts[-1]} ones of its bitmask")

    def same(piece: tuple[tuple[int, int], tuple[int, int]]) -> bool:
        (start, stop), (first, last) = piece
        block, here = stored[start:stop], kept[first:last]
        ones = np.unpackbits(mask[start // 8 :], count=block.size, bitorder="little").view(np.bool_)
        return np.array_equal(block[ones], here) and np.count_nonzero(block) == np.count_nonzero(here)

    for (start, stop), equal in zip(
        blocks, in_order(same, zip(blocks, pairwise(starts), strict=True)), strict=True
    ):
        if not equal:
            raise FormatError(f"{where}: elements {start} to {stop - 1} are not the model's")


def _check_bytes(shard: Shard, written: Path, names: list[str]) -> int:
    """Tensors that no library hands out, byte by byte."""
    ours = Shard.open(written)
    for name in names:
        mine, other = shard.info(name), ours.info(name)
        pairs = zip(
            copy_spans(shard.path, mine.start, mine.nbytes),
            copy_spans(written, other.start, other.nbytes),
            strict=True,
        )
        if mine.dtype != other.dtype or not all(np.array_equal(a, b) for a, b in pairs):
            raise FormatError(f"{written}: {name}: differs from {shard.path} after it was written")
    return len(names)
