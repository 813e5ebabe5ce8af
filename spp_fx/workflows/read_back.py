"""Proof of a merge from disk: masks against the lock, everything else against the base, byte for byte.

Nothing here is shared with the writer: files are opened anew, their headers read by the safetensors library as
well, and masks are scanned, not taken from what was folded.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.checkpoint import ModelFolder, Shard
from spp_fx.errors import FormatError, MaskError
from spp_fx.parallel import in_order
from spp_fx.progress import Tick, no_tick
from spp_fx.sparsity import (
    LockEntry,
    PackedMask,
    compare_masks,
    load_scanner,
    make_entry,
    scan_bits,
    scan_file,
)

_BLOCK = 4 << 20
_RUN = 64 << 20  # bytes of the base that one task compares


@dataclass(frozen=True)
class ReadBack:
    """What was read back.

    Attributes:
        entries: the lock of what was written, by tensor; of one that is stored twice, both copies were looked at.
        mask_equal: by tensor, whether its mask is the lock's.
        digests: SHA-256 by weight file.
    """

    entries: dict[str, LockEntry] = field(default_factory=dict[str, LockEntry])
    mask_equal: dict[str, bool] = field(default_factory=dict[str, bool])
    digests: dict[str, str] = field(default_factory=dict[str, str])


def read_back(
    base: ModelFolder,
    written: Path,
    locked: Mapping[str, LockEntry],
    counts: Mapping[str, FoldCounts],
    vanish: Vanish,
    tick: Tick,
) -> ReadBack:
    """Hold every byte on disk to the lock or to the base, on all cores.

    Args:
        base: the model that was folded into.
        written: the folder that was written.
        locked: the entries that masks are held to, by tensor.
        counts: by folded tensor, what folding met; every other tensor must have the base's bytes.
        vanish: under `allow`, a mask may have lost the values that vanished, and no other.

    Raises:
        FormatError: a file or a tensor that was copied is not the base's.
        MaskError: a mask is not the lock's; names the tensor.
    """
    load_scanner()
    found = ReadBack()

    def tasks() -> Iterator[Callable[[], None]]:
        for shard in base.shards:
            copy = _reopen(shard, written / shard.name)
            yield partial(_hash, copy, found)
            for start, stop in _copied(shard, counts):
                yield partial(_compare, shard, copy, start, stop)
            for name in shard.header.tensors:
                if name in locked:
                    yield partial(_prove, shard, copy, locked[name], counts.get(name), vanish, found, tick)

    # Hashing a file takes as long as many a mask: the others do not wait for it.
    for _ in in_order(lambda task: task(), tasks(), ahead=1024):
        pass
    return found


def unproven(
    base: ModelFolder,
    written: Path,
    locked: Mapping[str, LockEntry],
    counts: Mapping[str, FoldCounts],
    vanish: Vanish,
) -> ReadBack:
    """The lock of what was written where nothing is read back: the locked entries, less what was let vanish.

    Raises:
        MaskError: a mask lost more than the values that vanished, or gained some.
    """
    found = ReadBack()
    for shard in base.shards:
        for name in shard.header.tensors.keys() & locked.keys():
            entry, met = locked[name], counts.get(name)
            if vanish == "allow" and met is not None and met.vanished:
                copy = Shard.open(written / shard.name, shard.name)
                _prove(shard, copy, entry, met, vanish, found, no_tick)
                found.mask_equal.pop(name, None)
            else:
                found.entries[name] = entry
    return found


def _reopen(shard: Shard, path: Path) -> Shard:
    """A file that was written, its header held to the base's by our reader and by the safetensors library."""
    from safetensors import SafetensorError, safe_open

    copy = Shard.open(path, shard.name)
    if copy.header.raw != shard.header.raw:
        raise FormatError(f"{shard.name}: read back, its header is not that of the base")
    try:
        with safe_open(str(path), framework="np") as file:
            if set(file.keys()) != set(shard.header.tensors):
                raise FormatError(f"{shard.name}: read back, its tensors are not those of the base")
    except SafetensorError as error:
        raise FormatError(f"{shard.name}: cannot be read back: {error}") from error
    return copy


def _hash(copy: Shard, found: ReadBack) -> None:
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    with open(copy.path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    found.digests[copy.name] = digest.hexdigest()


def _copied(shard: Shard, folded: Mapping[str, FoldCounts]) -> Iterable[tuple[int, int]]:
    """Runs of bytes that belong to no folded tensor."""
    start = shard.header.data_start
    for info in shard.header.tensors.values():
        if info.name in folded:
            yield from _cut(start, info.start)
            start = info.end
    yield from _cut(start, shard.header.data_end)


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + _RUN, stop)) for at in range(start, stop, _RUN))


def _compare(shard: Shard, copy: Shard, start: int, stop: int) -> None:
    ours, theirs = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    with open(shard.path, "rb", buffering=0) as base, open(copy.path, "rb", buffering=0) as file:
        base.seek(start)
        file.seek(start)
        while start < stop:
            count = min(_BLOCK, stop - start)
            if base.readinto(theirs[:count].data) != count or file.readinto(ours[:count].data) != count:
                raise FormatError(f"{shard.name}: ended while it was read back")
            different = ours[:count] != theirs[:count]
            if different.any():
                tensor = _tensor_at(shard, start + int(different.argmax()))
                raise FormatError(f"{shard.name}: read back, {tensor} differs from the base")
            start += count


def _tensor_at(shard: Shard, offset: int) -> str:
    return next(info.name for info in shard.header.tensors.values() if info.start <= offset < info.end)


def _prove(
    shard: Shard,
    copy: Shard,
    entry: LockEntry,
    counts: FoldCounts | None,
    vanish: Vanish,
    found: ReadBack,
    tick: Tick,
) -> None:
    mask = _mask(copy, entry)
    equal = mask.digest == entry.mask and mask.shape == entry.shape
    if not equal and not (
        vanish == "allow" and counts is not None and _only_vanished(_mask(shard, entry), mask, counts)
    ):
        raise MaskError(f"{entry.name}: read back from disk, its mask is not the lock's")
    pattern = entry.parsed_pattern()
    if pattern is not None and (broken := scan_bits(mask, pattern)).count:
        raise MaskError(f"{entry.name}: read back from disk: {broken.describe(pattern)}")
    found.mask_equal[entry.name] = equal
    found.entries[entry.name] = (
        entry if equal else make_entry(entry.name, entry.kind, mask, pattern, entry.transposed)
    )
    tick(entry.name, copy.info(entry.name).nbytes)


def _mask(shard: Shard, entry: LockEntry) -> PackedMask:
    info = shard.info(entry.name)
    scan = scan_file(shard.path, info.start, info.shape, info.dtype, transposed=entry.transposed)
    if scan.first_non_finite is not None:
        raise MaskError(f"{entry.name}: read back from disk, it holds NaN or infinity")
    return scan.mask


def _only_vanished(before: PackedMask, now: PackedMask, counts: FoldCounts) -> bool:
    """Whether a mask is the base's less the values that folded to zero: no position gained, so many lost."""
    found = compare_masks(before, now, limit=1)
    return found.lost_zeros == 0 and found.new_zeros == counts.vanished
