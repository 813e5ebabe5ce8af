"""Exports whose sites are packed: one safetensors file for each weight file of the model, written and read.

A model in one file gives `packed.safetensors`, one in N files `packed-00001-of-N.safetensors` and so on, which
hold the tensors of the model's files in the same order. A packed site is stored as tensors NAME.PART, any
other tensor as it is. A format says in `Layouts` which parts those are and how rows are decoded from them, and
in `Packing` how positions become metadata. All else is here: streaming, resuming, reading back and `verify`.

A site is read, packed and written in bands of rows, by several threads; its metadata is written at the end.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.exporters.format import (
    ROUNDED,
    Decoded,
    Say,
    Source,
    TensorFile,
    Tick,
    Weights,
    new_tensor_file,
)
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord, read_manifest, site_sizes
from spp_fx.exporters.read_back import check_copied, lost_signs
from spp_fx.parallel import in_order
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.packing import Packed24, for_row_chunks, kernels, pack_rows, unpack_1_2, unpack_2_4
from spp_fx.sparsity.pattern import NM, implies, scan_bits
from spp_fx.sparsity.scan import Scan, scan_stored, scan_tensor
from spp_fx.storage.folder import within
from spp_fx.storage.output import check_space
from spp_fx.storage.safetensors import BITS, Shard, stored_nbytes, torch_dtype
from spp_fx.storage.writer import TensorSpec

DENSE = "dense"
BAND_BYTES = 1 << 21
"""Of dense weight: with what is made of it, it stays in a core's own cache."""
# Not a name that loaders of plain models look for: transformers would fill the packed weights with random numbers.
_FILE_NAME = re.compile(r"packed(-\d{5,}-of-\d{5,})?\.safetensors", re.ASCII)

Rows = Callable[[int, int], Tensor]
"""Rows start <= i < stop of a canonical (out, in) weight."""


def file_names(count: int) -> list[str]:
    """The names of the packed files of a model in `count` weight files."""
    if count == 1:
        return ["packed.safetensors"]
    return [f"packed-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


@dataclass(frozen=True)
class Layouts:
    """The packed layouts of a format, as a reader knows them.

    Attributes:
        parts: layout -> the tensors that store a site of this shape (out, in) and dtype, by what follows the
            site's name and a dot. The first begins with the values (out, in / 2), row-major; all bytes after
            them are metadata.
        refusal: why a record cannot have its layout, None where it can.
        rows: the decoded rows of a site, from a file whose parts have been checked.
    """

    parts: dict[str, Callable[[tuple[int, int], str], dict[str, tuple[str, tuple[int, ...]]]]]
    refusal: Callable[[TensorRecord], str | None]
    rows: Callable[[Shard, TensorRecord], Rows]

    def specs(self, record: TensorRecord) -> list[TensorSpec]:
        """Names, dtypes and shapes of the tensors that store a site; none where it is dense."""
        if record.layout == DENSE:
            return []
        m, k = record.shape
        parts = self.parts[record.layout]((m, k), record.dtype)
        return [(f"{record.name}.{part}", *spec) for part, spec in parts.items()]

    def sizes(self, records: Iterable[TensorRecord], files: Iterable[Path]) -> dict[str, int]:
        """`site_sizes` of an export."""
        dense = packed = 0
        for record in records:
            dense += record.dense_bytes
            packed += _nbytes(self.specs(record)) if record.layout != DENSE else record.dense_bytes
        return site_sizes(dense, packed, files)


def _nbytes(specs: Iterable[TensorSpec]) -> int:
    return sum(stored_nbytes(dtype, shape, name) for name, dtype, shape in specs)


# Writing


@dataclass(frozen=True)
class Packing:
    """How the sites of a layout are packed.

    Attributes:
        order: called with positions (r, bytes) of `Packed24`, the bytes of all metadata, the number of the first
            of these rows, and the shape (out, in); puts the positions where they belong.
        step: rows that `order` takes are multiples of this.
        group: columns that share half as many slots, see `pack_rows`.
    """

    order: Callable[[Tensor, Tensor, int, tuple[int, int]], None]
    step: int
    group: int = 4


Choose = Callable[[LockEntry], tuple[str, str | None]]
"""How a site is to be stored, and why not packed if it is not."""


def plan(source: Source, choose: Choose, takes: str) -> dict[str, TensorRecord]:
    """The record of every site, by name, as it is to be stored.

    Args:
        takes: the weights that the format can pack, in words.

    Raises:
        UsageError: a weight is stored in a dtype (float8, int8, ...) that `runtime.load` cannot load.
        PatternError: no weight can be packed.
    """
    for name in source.folder.names:
        info = source.folder.info(name)[1]
        if _is_weight(name, info.dtype, info.shape, name in source.sites) and info.dtype not in ROUNDED:
            raise UsageError(
                f"{source.folder.path}: {name} is stored as {info.dtype}, which means nothing without its scales: "
                "a packed export could not be loaded, and --dtype does not round it. Export the model before "
                "it was quantized, or as it is with --format safetensors"
            )
    records = {entry.name: source.record(entry, *choose(entry)) for entry in source.lock.sites}
    if all(record.layout == DENSE for record in records.values()):
        patterns = ", ".join(sorted({str(entry.pattern) for entry in source.lock.sites}))
        raise PatternError(
            f"{source.folder.path}: no weight can be packed, {takes} alone and the lock says {patterns}: "
            f"{count_reasons(records.values())}; other formats take it, such as sparse-bitmask"
        )
    return records


def _is_weight(name: str, dtype: str, shape: tuple[int, ...], site: bool) -> bool:
    """Whether a tensor is a parameter: small floats of two dimensions are no buffers, integers may be."""
    small = dtype.startswith("F") and BITS[dtype] <= 8
    return site or (len(shape) > 1 and (small or name.endswith(".weight")))


def count_reasons(records: Iterable[TensorRecord]) -> str:
    """The reasons of weights that are not packed, each with how many have it."""
    every = list(records)
    reasons = Counter(record.reason for record in every if record.reason is not None)
    return "; ".join(f"{reason} ({count} of {len(every)})" for reason, count in reasons.most_common())


def holds(source: Source, entry: LockEntry, pattern: NM) -> bool:
    """Whether a matrix holds an N:M pattern: its lock says so, or else its zeros do."""
    if entry.shape[1] % 4:
        return False
    if implies(entry.parsed_pattern(), pattern):
        return True
    mask = scan_stored(source.folder.info(entry.name)[0], entry.name, transposed=entry.transposed).mask
    return scan_bits(mask, pattern).count == 0


def write_packed(
    source: Source,
    target: Path,
    format: str,
    records: dict[str, TensorRecord],
    layouts: Layouts,
    packing: Callable[[TensorRecord], Packing],
    requirements: dict[str, int | str],
    tick: Tick,
    say: Say,
) -> dict[str, int]:
    """Write an export and compare it with the model, as read back from the disk.

    Args:
        source, target, tick, say: as for `Format.write`.
        format: its name.
        records: `plan`.
        layouts, packing: of the format.
        requirements: of the manifest.

    Returns:
        How many sites have each layout, and what was compared.
    """
    names = write_files(source, target, records, layouts, packing, tick)
    source.copy_small_files(target)
    sizes = layouts.sizes(records.values(), [target / name for name in names])
    source.finish(target, format, source.lock, list(records.values()), requirements=requirements, sizes=sizes)
    counts = Counter(record.layout for record in records.values())
    checks = _read_back(
        source, PackedModel.open(target, read_manifest(target, check_files=False), layouts), say
    )
    return {layout: counts[layout] for layout in (*layouts.parts, DENSE)} | checks


def write_files(
    source: Source,
    target: Path,
    records: dict[str, TensorRecord],
    layouts: Layouts,
    packing: Callable[[TensorRecord], Packing],
    tick: Tick,
) -> list[str]:
    """Write the packed files that an earlier run has not finished; returns the names of all.

    A record whose site lost signs of zeros is replaced by one that says how many.
    """
    names, work = file_names(len(source.folder.shards)), source.work
    known = {name: work.finished(name) if work is not None else None for name in names}
    files: dict[str, dict[str, list[TensorSpec]]] = {name: {} for name in names}
    by_shard = dict(zip((shard.name for shard in source.folder.shards), names, strict=True))
    for name in source.folder.names:
        shard, info = source.folder.info(name)
        packed = layouts.specs(records[name]) if name in records else []
        files[by_shard[shard.name]][name] = packed or [(name, source.dtype(name), info.shape)]
    check_space(target, target, sum(_nbytes(_flat(files[name])) for name in names if known[name] is None))
    for name in names:
        facts = known[name]
        if facts is None:
            with new_tensor_file(target / name, _flat(files[name]), {"format": "pt"}) as file:
                lost = _fill_file(source, file, files[name], records, packing, tick)
            facts = {"negative_zeros": {site: count for site, count in lost.items() if count}}
            if work is not None:
                work.finish(name, **facts)
        for site, count in facts["negative_zeros"].items():
            records[site] = records[site].model_copy(update={"negative_zeros": count})
    return names


def _flat(specs: Mapping[str, list[TensorSpec]]) -> list[TensorSpec]:
    return [spec for each in specs.values() for spec in each]


def _fill_file(
    source: Source,
    file: TensorFile,
    specs: Mapping[str, list[TensorSpec]],
    records: Mapping[str, TensorRecord],
    packing: Callable[[TensorRecord], Packing],
    tick: Tick,
) -> dict[str, int]:
    """Write some tensors of the model into a file; returns how many zeros lost their sign, by site."""
    entries, lost = source.lock.by_name(), dict[str, int]()
    for name, parts in specs.items():
        record = records.get(name)
        if record is None or record.layout == DENSE:
            file.write(name, source.stored(name))
            continue
        lost[name] = pack_site(
            _rows(source, entries[name]), record, packing(record), file, [part for part, _, _ in parts]
        )
        tick(name, source.folder.info(name)[1].nbytes)
    return lost


def pack_site(rows: Rows, record: TensorRecord, packing: Packing, file: TensorFile, parts: list[str]) -> int:
    """Pack a site into its parts in a file; returns how many zeros lost their sign.

    Raises:
        PatternError: the weight does not hold its pattern; names the first row and columns.
    """
    m, k = record.shape
    dtype = torch_dtype(record.dtype)
    row_bytes = k // 2 * dtype.itemsize
    sizes = [file.nbytes(part) for part in parts]
    metadata = torch.empty(sum(sizes) - m * row_bytes, dtype=torch.uint8)
    step = max(1, BAND_BYTES // max(1, packing.step * 2 * row_bytes)) * packing.step

    def pack(start: int) -> int:
        band = rows(start, min(start + step, m))
        values = torch.empty((len(band), k // 2), dtype=dtype)
        positions = torch.empty((len(band), (k // packing.group + 1) // 2), dtype=torch.uint8)
        try:
            cleared = pack_rows(band, values, positions, start, packing.group, clear=True)
        except PatternError as error:
            raise PatternError(f"{record.name}: {error}") from None
        file.write(parts[0], values, start * row_bytes)
        packing.order(positions, metadata, start, (m, k))
        return cleared

    cleared = sum(in_order(pack, range(0, m, step)))
    # What is left of the first part, then the others.
    written, at = 0, m * row_bytes
    for part, size in zip(parts, sizes, strict=True):
        file.write(part, metadata[written : written + size - at], at)
        written, at = written + size - at, 0
    return cleared


def _rows(source: Source, entry: LockEntry) -> Rows:
    """Rows of a site as it is exported, read when they are asked for; of a transposed one, all at once."""
    if entry.transposed:
        weight = source.canonical(entry)
        return lambda start, stop: weight[start:stop]
    return lambda start, stop: source.as_exported(
        entry.name, source.folder.read_rows(entry.name, start, stop)
    )


def _read_back(source: Source, model: "PackedModel", say: Say) -> dict[str, int]:
    """Decode every packed site from the files just written, compare the other tensors; returns what was equal.

    Raises:
        MaskError: a value is not the model's; a zero that lost its sign is counted, and said.
        FormatError: another tensor is not the model's.
    """
    entries = source.lock.by_name()
    checks = {"bit_exact": 0, "signs_of_zeros_lost": 0, "tensors_equal": 0}
    for name, record in model.records.items():
        if record.layout == DENSE:
            continue
        lost = _compare(model.rows(name), _rows(source, entries[name]), record)
        checks["signs_of_zeros_lost" if lost else "bit_exact"] += 1
        if lost:
            say(f"warning: {name}: {lost} zeros of negative sign were written as +0")
    copied: dict[Path, list[str]] = {}
    dense = [name for name, record in model.records.items() if record.layout == DENSE]
    for name in source.folder.names:
        if name not in entries or name in dense:
            copied.setdefault(model.file_of(name).path, []).append(name)
    for path, names in copied.items():
        check_copied(source.folder, names, path, source.as_exported)
        sites = sum(name in entries for name in names)
        checks["bit_exact"] += sites
        checks["tensors_equal"] += len(names) - sites
    return checks


def _compare(decoded: Rows, stored: Rows, record: TensorRecord) -> int:
    """How many zeros of a site differ from the model's in sign alone."""
    m, k = record.shape
    step = max(1, BAND_BYTES // max(1, k * torch_dtype(record.dtype).itemsize))

    def compare(start: int) -> int:
        stop = min(start + step, m)
        lost = lost_signs(decoded(start, stop), stored(start, stop))
        if lost is None:
            raise MaskError(f"{record.name}: decoded from the export, it is not the model's weight")
        return lost

    return sum(in_order(compare, range(0, m, step)))


# Reading


def open_files(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """The packed file of every stored tensor.

    Raises:
        FormatError: there is no file, or a tensor is in two of them.
    """
    where: dict[str, Shard] = {}
    names = [name for name in manifest.files if _FILE_NAME.fullmatch(name)]
    if not names:
        raise FormatError(f"{folder / MANIFEST}: files: names no packed file")
    for name in names:
        shard = Shard.open(within(folder, name), name)
        for tensor in shard.header.tensors:
            if tensor in where:
                raise FormatError(f"{shard.path}: {tensor}: is in {where[tensor].path} too; export again")
            where[tensor] = shard
    return where


@dataclass(frozen=True)
class PackedModel:
    """The weights of such an export; its manifest is checked, its tensors are decoded when asked for.

    Attributes:
        where: the file of each stored tensor.
        records: the sites, by name.
        layouts: of the format.
    """

    where: dict[str, Shard]
    records: dict[str, TensorRecord]
    layouts: Layouts

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, layouts: Layouts) -> "PackedModel":
        """Check the manifest's records against the files' headers.

        Raises:
            FormatError: a layout that is unknown or cannot be; a part that is missing, in another file than the
                first, or of another shape.
        """
        where = open_files(folder, manifest)
        paths = {shard.path for shard in where.values()}
        missing = paths.pop() if len(paths) == 1 else folder
        for index, record in enumerate(manifest.tensors):
            _check_record(record, layouts, f"{folder / MANIFEST}: tensors.{index}")
            specs = layouts.specs(record)
            first = specs[0][0] if specs else record.name
            for part in [part for part, _, _ in specs] or [record.name]:
                if part not in where:
                    raise FormatError(f"{missing}: holds no tensor {part}, {MANIFEST} says it does")
                if where[part] is not where[first]:
                    raise FormatError(f"{where[part].path}: {part}: {first} is in {where[first].path}")
            for part, dtype, shape in specs:
                info = where[part].info(part)
                if info.dtype != dtype or info.shape != shape:
                    raise FormatError(
                        f"{where[part].path}: {part} is {info.dtype} {list(info.shape)}, "
                        f"expected {dtype} {list(shape)}"
                    )
        return cls(where, {record.name: record for record in manifest.tensors}, layouts)

    def file_of(self, name: str) -> Shard:
        """The file that holds a tensor of the model."""
        record = self.records.get(name)
        specs = self.layouts.specs(record) if record is not None else []
        return self.where[specs[0][0] if specs else name]

    def rows(self, name: str) -> Rows:
        """The rows of a packed site.

        Raises (when rows are taken):
            FormatError: the metadata is invalid; names file, site, row and columns.
        """
        shard = self.file_of(name)
        decode = self.layouts.rows(shard, self.records[name])

        def rows(start: int, stop: int) -> Tensor:
            try:
                return decode(start, stop)
            except FormatError as error:
                raise FormatError(f"{shard.path}: {name}: {error}") from None

        return rows

    def weights(self) -> Weights:
        """What `verify` reads."""

        def scan(name: str, transposed: bool) -> Scan:
            record = self.records.get(name)
            if record is None or record.layout == DENSE:
                return scan_stored(self.where[name], name, transposed=transposed)
            return scan_tensor(self.rows(name)(0, record.shape[0]))

        sites = {name: record.transposed for name, record in self.records.items()}
        names = frozenset(self.decoded().shapes)
        return Weights(names, scan, lambda name: self.file_of(name).name, lambda: sites)

    def decoded(self) -> Decoded:
        """The model's tensors, as the model stores them."""
        packed = [record for record in self.records.values() if record.layout != DENSE]
        parts = {part for record in packed for part, _, _ in self.layouts.specs(record)}
        shapes = {name: shard.info(name).shape for name, shard in self.where.items() if name not in parts}
        for record in packed:
            m, k = record.shape
            shapes[record.name] = (k, m) if record.transposed else (m, k)

        def read(name: str) -> Tensor:
            record = self.records.get(name)
            if record is None or record.layout == DENSE:
                return self.where[name].read(name)
            weight = self.rows(name)(0, record.shape[0])
            return weight.t().contiguous() if record.transposed else weight

        return Decoded(shapes, read)


def _check_record(record: TensorRecord, layouts: Layouts, where: str) -> None:
    if record.layout == DENSE:
        return
    if record.layout not in layouts.parts:
        raise FormatError(
            f"{where}.layout: '{record.layout}', expected one of {', '.join((*layouts.parts, DENSE))}"
        )
    if len(record.shape) != 2 or record.shape[1] % 4:
        raise FormatError(f"{where}.shape: {record.shape} is no matrix of whole groups of four")
    try:
        torch_dtype(record.dtype)
    except FormatError as error:
        raise FormatError(f"{where}.dtype: {error}") from None
    if reason := layouts.refusal(record):
        raise FormatError(f"{where}.layout: '{record.layout}', which cannot be: {reason}")


Indices = npt.NDArray[np.int64]


def gather(meta: Tensor, rows: Indices, groups: Indices) -> Tensor:
    """Positions in row-major order, from metadata in another order.

    Args:
        meta: metadata, two nibbles a byte, the low one first; contiguous, on the CPU.
        rows, groups: the nibble of group j of row i is number rows[i] + groups[j]; an even number of groups.

    Returns:
        (rows, groups/2) uint8, as in `Packed24`.
    """
    positions = torch.empty((len(rows), len(groups) // 2), dtype=torch.uint8)
    data = meta.reshape(-1).view(torch.uint8).numpy()
    compiled = kernels(positions)

    def work(start: int, stop: int) -> None:
        if compiled:
            compiled.gather_nibbles(data, rows[start:stop], groups, positions[start:stop].numpy())
            return
        at = rows[start:stop, None] + groups
        found = data[at >> 1] >> ((at & 1) << 2).astype(np.uint8) & 0xF
        positions[start:stop] = torch.from_numpy(found[:, 0::2] | found[:, 1::2] << 4)

    for_row_chunks(work, len(rows), 4 * len(groups))
    return positions


def decoded_rows(neutral: Packed24, group: int = 4) -> Rows:
    """Dense rows of a 2:4 (group 4) or 1:2 (group 2) weight in its layout-neutral form."""
    unpack = unpack_2_4 if group == 4 else unpack_1_2
    values, positions, (_, k) = neutral.values, neutral.positions, neutral.shape
    return lambda start, stop: unpack(Packed24(values[start:stop], positions[start:stop]), k, start)
