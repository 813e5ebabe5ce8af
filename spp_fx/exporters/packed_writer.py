"""Writing exports whose sites are packed into one safetensors file: streamed, then compared from disk.

A site is read, packed and written in bands of rows: threads read and pack them in the order of rows while
the caller's thread writes what is finished. Memory holds the packed form of one site, and a band a thread;
of a site that the model stores transposed, also the weight.
"""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.errors import MaskError, PatternError, SppFxError, UsageError
from spp_fx.exporters.checks import check_copied, lost_signs
from spp_fx.exporters.format import ROUNDED, Say, Source, Tick
from spp_fx.exporters.manifest import Manifest, TensorRecord, site_sizes
from spp_fx.exporters.packed_reader import DENSE, WEIGHTS, Layouts, PackedModel, Rows
from spp_fx.exporters.semi_structured import in_parallel, pack_rows
from spp_fx.parallel import thread_count
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.pattern import NM, implies, scan_bits
from spp_fx.sparsity.scan import scan_stored
from spp_fx.storage.safetensors import BITS, Shard, torch_dtype
from spp_fx.storage.workspace import Workspace
from spp_fx.storage.writer import Content, Memory, TensorSpec, write_in_parts, write_safetensors

BAND_BYTES = 1 << 21
"""Of dense weight: with what becomes of it, it stays in a core's own cache."""
_WAITING = "waiting.bin"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Buffers:
    """Memory that a site is packed into.

    Attributes:
        values: (m, k/2), where kept entries go.
        fill: puts positions of rows (r, bytes), from a given row on, where they belong.
        step: rows that `fill` takes are multiples of this.
        group: columns that share half as many slots, see `pack_rows`.
    """

    values: Tensor
    fill: Callable[[Tensor, int], None]
    step: int
    group: int = 4


Allocate = Callable[[TensorRecord, dict[str, Tensor]], Buffers]
"""The buffers of a record, given memory for its parts by their names; the first begins with the values."""


def holds(source: Source, entry: LockEntry, pattern: NM) -> bool:
    """Whether a matrix holds an N:M pattern: its lock says so, or else its zeros do."""
    if entry.shape[1] % 4:
        return False
    if implies(entry.parsed_pattern(), pattern):
        return True
    mask = scan_stored(source.folder.info(entry.name)[0], entry.name, transposed=entry.transposed).mask
    return scan_bits(mask, pattern).count == 0


def count_reasons(records: Iterable[TensorRecord]) -> str:
    """The reasons of weights that are not packed, each with how many have it."""
    every = list(records)
    reasons = Counter(record.reason for record in every if record.reason is not None)
    return "; ".join(f"{reason} ({count} of {len(every)})" for reason, count in reasons.most_common())


def refuse_nothing_packed(source: Source, records: Iterable[TensorRecord], what: str) -> None:
    """Raise PatternError, for an export that would hold nothing but dense weights; `what` says what it takes."""
    patterns = ", ".join(sorted({str(entry.pattern) for entry in source.lock.sites}))
    raise PatternError(
        f"{source.folder.path}: no weight can be packed, {what} and the lock says {patterns}: "
        f"{count_reasons(records)}; other formats take it, such as sparse-bitmask"
    )


def refuse_quantized(source: Source, format: str) -> None:
    """Hold a model to what `runtime.load` takes: weights that are numbers by themselves, of 16 bits or more.

    Raises:
        UsageError: a weight is stored in another dtype (float8, int8, ...), so that nothing could load the export.
    """
    for name in source.folder.names:
        info = source.folder.info(name)[1]
        if _is_weight(name, info.dtype, info.shape, name in source.sites) and info.dtype not in ROUNDED:
            raise UsageError(
                f"{source.folder.path}: {name} is stored as {info.dtype}, which means nothing without its scales: "
                f"an export to {format} could not be loaded, and --dtype does not round it. Export the model before "
                "it was quantized, or as it is with --format safetensors"
            )


def _is_weight(name: str, dtype: str, shape: tuple[int, ...], site: bool) -> bool:
    """Whether a tensor is a parameter: small floats of two dimensions are no buffers, integers may be."""
    small = dtype.startswith("F") and BITS[dtype] <= 8
    return site or (len(shape) > 1 and (small or name.endswith(".weight")))


def pack_site(rows: Rows, m: int, buffers: Buffers, pool: ThreadPoolExecutor) -> Iterator[tuple[int, int]]:
    """Pack a weight of m rows into its buffers, band after band.

    Yields:
        How many rows are finished, and how many zeros of negative sign the last of them lost.

    Raises:
        PatternError: the weight does not hold its pattern; names the first row and columns.
    """
    k = 2 * buffers.values.shape[1]
    step = max(1, BAND_BYTES // max(1, buffers.step * k * buffers.values.element_size())) * buffers.step

    def pack(start: int) -> int:
        band = rows(start, min(start + step, m))
        positions = torch.empty((len(band), (k // buffers.group + 1) // 2), dtype=torch.uint8)
        values = buffers.values[start : start + step]
        cleared = pack_rows(band, values, positions, start, buffers.group, clear=True)
        buffers.fill(positions, start)
        return cleared

    starts = range(0, m, step)
    for start, cleared in zip(starts, pool.map(pack, starts), strict=True):
        yield min(start + step, m), cleared


def write_weights(
    source: Source,
    file: Path,
    records: dict[str, TensorRecord],
    layouts: Layouts,
    allocate: Allocate,
    tick: Tick,
) -> dict[str, TensorRecord]:
    """Write every tensor of the model to one file, the sites as their records say.

    Returns:
        The records, with the zeros of negative sign that were written as +0.
    """
    sites: dict[str, str] = {}
    specs: list[TensorSpec] = []
    for name in source.folder.names:
        record = records.get(name)
        if record is None or record.layout == DENSE:
            specs.append((name, source.dtype(name), source.folder.info(name)[1].shape))
        else:
            own = layouts.specs(record)
            specs += own
            sites |= {part: name for part, _, _ in own}
    entries, lost_zeros = source.lock.by_name(), dict[str, int]()
    with (
        _waiting(source.work, file) as waiting,
        ThreadPoolExecutor(thread_count(), thread_name_prefix="pack") as pool,
    ):
        spool, memory = _Spool(waiting, {}), _Memory({})

        def produce(name: str) -> Content:
            if name not in sites:
                return source.stored(name)
            return spool.take(name) if name in spool.places else pack(name)

        def pack(asked: str) -> Iterator[Tensor]:
            """The first of a site's parts that the file has room for; the others wait in the spool."""
            site = sites[asked]
            record = records[site]
            m, k = record.shape
            parts = {
                name: memory.tensor(name.removeprefix(site), dtype, shape)
                for name, dtype, shape in layouts.specs(record)
            }
            buffers = allocate(record, {name.removeprefix(f"{site}."): part for name, part in parts.items()})
            part, written, lost = parts[asked], 0, 0
            streamed = part is next(iter(parts.values()))
            for rows, cleared in pack_site(_rows(source, entries[site]), m, buffers, pool):
                lost += cleared
                ready = rows * (k // 2) // part.shape[1] if streamed and rows < m else written
                if ready > written:
                    yield part[written:ready]
                    written = ready
            yield part[written:]
            for name, tensor in parts.items():
                if name != asked:
                    spool.put(name, tensor)
            lost_zeros[site] = lost
            tick(site, source.folder.info(site)[1].nbytes)

        def facts() -> dict[str, Any]:
            return {"waiting": spool.sync(), "negative_zeros": lost_zeros}

        def recall(written: list[str], known: dict[str, Any]) -> bool:
            for asked in written:
                if asked in sites and asked not in spool.places:
                    spool.foresee(part for part in layouts.specs(records[sites[asked]]) if part[0] != asked)
            lost_zeros.update(known["negative_zeros"])
            return spool.cut(known["waiting"])

        if source.work is None:
            write_safetensors(file, specs, produce, _METADATA)
        else:
            name = file.relative_to(source.work.folder).as_posix()
            known = write_in_parts(source.work, name, specs, produce, _METADATA, Memory(facts, recall))
            lost_zeros.update(known["negative_zeros"])
    return {
        name: record.model_copy(update={"negative_zeros": lost_zeros[name]}) if name in lost_zeros else record
        for name, record in records.items()
    }


@contextmanager
def _waiting(work: Workspace | None, file: Path) -> Generator[BufferedRandom, None, None]:
    """A file for what waits for its place: one that outlives the process where the work may go on."""
    if work is None:
        with tempfile.TemporaryFile(dir=file.parent) as waiting:
            yield waiting
    else:
        path = work.store / _WAITING
        path.touch()
        with open(path, "r+b") as waiting:
            yield waiting


@dataclass(frozen=True)
class _Spool:
    """Tensors that are made before their place in the file has come.

    A file lays tensors out by dtype and name, so that parts of a site are far from one another.
    """

    file: BufferedRandom
    places: dict[str, tuple[int, torch.dtype, torch.Size]]

    @property
    def size(self) -> int:
        """Bytes that are waiting, or were."""
        return sum(shape.numel() * dtype.itemsize for _, dtype, shape in self.places.values())

    def put(self, name: str, tensor: Tensor) -> None:
        self.places[name] = self.file.seek(self.size), tensor.dtype, tensor.shape
        self.file.write(tensor.view(-1).view(torch.uint8).numpy().data)

    def sync(self) -> int:
        """Make what is waiting durable; returns how many bytes that are."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size

    def foresee(self, specs: Iterable[TensorSpec]) -> None:
        """Say that an earlier run put these, one after the other."""
        for name, dtype, shape in specs:
            self.places[name] = self.size, torch_dtype(dtype), torch.Size(shape)

    def cut(self, size: int) -> bool:
        """Drop what was put after the file was made durable at this size; says whether all before is there."""
        there = self.size == size <= os.fstat(self.file.fileno()).st_size
        if there:
            self.file.truncate(size)
        else:
            self.places.clear()
        return there

    def take(self, name: str) -> Tensor:
        offset, dtype, shape = self.places[name]
        data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self.file.seek(offset)
        if self.file.readinto(data.numpy().data) != len(data):
            raise SppFxError(f"{name}: the temporary file that it waited in is too short; export again")
        return data.view(dtype).view(shape)


@dataclass(frozen=True)
class _Memory:
    """Memory for one tensor a purpose, kept for the next: new pages cost as much as packing into them.

    It is numpy's, which asks the system for large pages.
    """

    held: dict[str, npt.NDArray[np.uint8]]

    def tensor(self, purpose: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialized tensor, valid until the next one for the same purpose."""
        own = torch_dtype(dtype)
        count = math.prod(shape) * own.itemsize
        if purpose not in self.held or self.held[purpose].size < count:
            self.held[purpose] = np.empty(max(1, count), dtype=np.uint8)
        return torch.from_numpy(self.held[purpose])[:count].view(own).view(shape)


def _rows(source: Source, entry: LockEntry) -> Rows:
    """Rows of a site as it is exported, read when they are asked for; of a transposed one, all at once."""
    if entry.transposed:
        weight = source.canonical(entry)
        return lambda start, stop: weight[start:stop]
    return lambda start, stop: source.as_exported(
        entry.name, source.folder.read_rows(entry.name, start, stop)
    )


def sizes(records: Collection[TensorRecord], layouts: Layouts, file: Path) -> dict[str, int]:
    """`site_sizes` of an export in one file."""
    shard = Shard.open(file)
    parts = (part for record in records for part, _, _ in layouts.specs(record))
    unpacked = sum(record.dense_bytes for record in records if record.layout == DENSE)
    packed = sum(shard.info(part).nbytes for part in parts)
    return site_sizes(sum(record.dense_bytes for record in records), unpacked + packed, [file])


def read_back(source: Source, folder: Path, manifest: Manifest, layouts: Layouts, say: Say) -> dict[str, int]:
    """Decode every packed site from the file just written, compare the other tensors; returns what was equal.

    Raises:
        MaskError: a value is not the model's; a zero that lost its sign is counted, and said.
        FormatError: another tensor is not the model's.
    """
    model, entries = PackedModel.open(folder, manifest, layouts), source.lock.by_name()
    packed = [record.name for record in manifest.tensors if record.layout != DENSE]
    checks = {"bit_exact": 0, "signs_of_zeros_lost": 0, "tensors_equal": 0}
    for name in packed:
        lost = _compare(model.rows(name), _rows(source, entries[name]), model.records[name])
        checks["signs_of_zeros_lost" if lost else "bit_exact"] += 1
        if lost:
            say(f"warning: {name}: {lost} zeros of negative sign were written as +0")
    dense = [record.name for record in manifest.tensors if record.layout == DENSE]
    others = [name for name in source.folder.names if name not in entries]
    checks["bit_exact"] += check_copied(source.folder, dense, folder / WEIGHTS, source.as_exported)
    checks["tensors_equal"] = check_copied(source.folder, others, folder / WEIGHTS, source.as_exported)
    return checks


def _compare(decoded: Rows, stored: Rows, record: TensorRecord) -> int:
    """How many zeros of a site differ from the model's in sign alone."""
    m, k = record.shape
    counts: list[int] = []

    def compare(start: int, stop: int) -> None:
        lost = lost_signs(decoded(start, stop), stored(start, stop))
        if lost is None:
            raise MaskError(f"{record.name}: decoded from the export, it is not the model's weight")
        counts.append(lost)

    step = max(1, BAND_BYTES // max(1, k * torch_dtype(record.dtype).itemsize))
    in_parallel(compare, ((start, min(start + step, m)) for start in range(0, m, step)))
    return sum(counts)
