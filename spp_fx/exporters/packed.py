"""Exports with packed sites: one safetensors file for each weight file of the model, written and read.

A model in one file gives `packed.safetensors`, one in N files `packed-00001-of-N.safetensors` and so on, which
hold the tensors of the model's files in the same order. A packed site is stored as tensors NAME.PART, any
other tensor as it is. A format says in `Layouts` which parts those are and how rows are decoded from them, and
in `Packing` how positions become metadata.

A site is read, packed and written in bands of rows, by several threads; its metadata is written at the end.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.exporters.format import ROUNDED, Decoded, Say, Source, TensorFile, Tick, new_tensor_file
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord, read_manifest, site_sizes
from spp_fx.exporters.read_back import check_copied, lost_signs
from spp_fx.parallel import in_order
from spp_fx.sparsity.lock import LockEntry
from spp_fx.sparsity.packing import Packed24, pack_rows, unpack_1_2, unpack_2_4
from spp_fx.sparsity.pattern import NM, implies, scan_bits
from spp_fx.sparsity.scan import scan_stored
from spp_fx.storage.folder import within
from spp_fx.storage.output import check_space
from spp_fx.storage.safetensors import BITS, Shard, stored_nbytes, torch_dtype
from spp_fx.storage.writer import TensorSpec, write_shards

DENSE = "dense"
BAND_BYTES = 1 << 21
"""Bytes of a band of a dense weight: small enough that all work on it stays in a core's own cache."""
# No loader of plain models looks for this name. It would fill the packed weights with random numbers.
_FILE_NAME = re.compile(r"packed(-\d{5,}-of-\d{5,})?\.safetensors", re.ASCII)

Rows = Callable[[int, int], Tensor]
"""Rows start <= i < stop of a canonical (out, in) weight."""


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["packed.safetensors"]
    return [f"packed-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


@dataclass(frozen=True)
class Packing:
    """How the positions of a site become its metadata.

    Attributes:
        order: called with positions (r, bytes) of `Packed24`, the bytes of all metadata, the number of the first
            of these rows, and the shape (out, in); puts the positions where they belong.
        step: rows that `order` takes are multiples of this.
        group: columns that share half as many slots, see `pack_rows`.
    """

    order: Callable[[Tensor, Tensor, int, tuple[int, int]], None]
    step: int = 1
    group: int = 4


@dataclass(frozen=True)
class Layout:
    """A packed layout of matrices (out, in).

    Attributes:
        parts: PART, dtype and shape of the tensors NAME.PART, given the matrix's shape and dtype. The first begins
            with the values (out, in / 2), row-major; all bytes after them are metadata.
        refusal: why a matrix of this shape and dtype cannot have the layout, None where it can.
        packing: how a matrix of this dtype is written.
        rows: the decoded rows of the stored parts, whose dtypes and shapes are right, and the matrix's shape.
    """

    parts: Callable[[tuple[int, int], str], dict[str, tuple[str, tuple[int, ...]]]]
    refusal: Callable[[tuple[int, ...], torch.dtype], str | None]
    packing: Callable[[torch.dtype], Packing]
    rows: Callable[[list[Tensor], tuple[int, int]], Rows]


Layouts = Mapping[str, Layout]


def specs_of(record: TensorRecord, layouts: Layouts) -> list[TensorSpec]:
    """Names, dtypes and shapes of the tensors that store a packed site; none where it is dense."""
    if record.layout == DENSE:
        return []
    m, k = record.shape
    parts = layouts[record.layout].parts((m, k), record.dtype)
    return [(f"{record.name}.{part}", *spec) for part, spec in parts.items()]


def _nbytes(specs: Iterable[TensorSpec]) -> int:
    return sum(stored_nbytes(dtype, shape, name) for name, dtype, shape in specs)


# Writing

Choose = Callable[[Source, LockEntry], tuple[str, str | None]]
"""The layout of a site, and why it is not packed."""


def plan(source: Source, choose: Choose, takes: str) -> dict[str, TensorRecord]:
    """The record of every site, by name.

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
    records = {entry.name: source.record(entry, *choose(source, entry)) for entry in source.lock.sites}
    if all(record.layout == DENSE for record in records.values()):
        patterns = ", ".join(sorted({str(entry.pattern) for entry in source.lock.sites}))
        raise PatternError(
            f"{source.folder.path}: no weight can be packed: {takes}, and the lock has {patterns}: "
            f"{count_reasons(records.values())}; export it in another format, such as sparse-bitmask"
        )
    return records


def _is_weight(name: str, dtype: str, shape: tuple[int, ...], site: bool) -> bool:
    """Whether a tensor is a parameter: 8-bit floats of two dimensions always are, integers may be buffers."""
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
    requirements: dict[str, int | str],
    tick: Tick,
    say: Say,
) -> dict[str, int]:
    """Write an export and compare it with the model, as read back from the disk.

    Args:
        source, target, tick, say: as for `Format.write`.
        format: its name.
        records: `plan`.
        layouts: of the format.
        requirements: of the manifest.

    Returns:
        How many sites have each layout, and what was compared.
    """
    names = write_files(source, target, records, layouts, tick)
    source.copy_small_files(target)
    every = list(records.values())
    sizes = site_sizes(
        sum(record.dense_bytes for record in every),
        sum(_nbytes(specs_of(record, layouts)) or record.dense_bytes for record in every),
        [target / name for name in names],
    )
    source.finish(target, format, every, requirements=requirements, sizes=sizes)
    written = PackedModel.open(target, read_manifest(target, check_files=False), layouts)
    checks, counts = _read_back(source, written, say), Counter(record.layout for record in every)
    return {layout: counts[layout] for layout in (*layouts, DENSE)} | checks


def write_files(
    source: Source, target: Path, records: dict[str, TensorRecord], layouts: Layouts, tick: Tick
) -> list[str]:
    """Write the packed files that an earlier run has not finished; returns the names of all.

    A record whose site loses signs of zeros is replaced by one that counts them.
    """
    specs: dict[str, dict[str, list[TensorSpec]]] = {shard.name: {} for shard in source.folder.shards}
    for name in source.folder.names:
        shard, info = source.folder.info(name)
        packed = specs_of(records[name], layouts) if name in records else []
        specs[shard.name][name] = packed or [(name, source.dtype(name), info.shape)]

    def write(shard: Shard, path: Path) -> dict[str, Any]:
        with new_tensor_file(path, _flat(specs[shard.name]), {"format": "pt"}) as file:
            lost = _fill_file(source, file, specs[shard.name], records, layouts, tick)
        return {"negative_zeros": {site: count for site, count in lost.items() if count}}

    names = _file_names(len(source.folder.shards))
    missing = [each for each, name in zip(specs.values(), names, strict=True) if not (target / name).exists()]
    check_space(target, target, sum(_nbytes(_flat(each)) for each in missing))
    for facts in write_shards(source.folder, target, write, source.work, names):
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
    layouts: Layouts,
    tick: Tick,
) -> dict[str, int]:
    """Write tensors of the model into a file; returns how many zeros lost their sign, by site."""
    entries, lost = source.lock.by_name(), dict[str, int]()
    for name, parts in specs.items():
        record = records.get(name)
        if record is None or record.layout == DENSE:
            file.write(name, source.stored(name))
            continue
        packing = layouts[record.layout].packing(torch_dtype(record.dtype))
        names = [part for part, _, _ in parts]
        lost[name] = _pack_site(_rows(source, entries[name]), record, packing, file, names)
        tick(name, source.folder.info(name)[1].nbytes)
    return lost


def _pack_site(rows: Rows, record: TensorRecord, packing: Packing, file: TensorFile, parts: list[str]) -> int:
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
    # The metadata are the rest of the first part, then the other parts.
    written, at = 0, m * row_bytes
    for part, size in zip(parts, sizes, strict=True):
        file.write(part, metadata[written : written + size - at], at)
        written, at = written + size - at, 0
    return cleared


def _rows(source: Source, entry: LockEntry) -> Rows:
    """The rows of a site as it is exported; a transposed one is read at once."""
    if entry.transposed:
        weight = source.canonical(entry)
        return lambda start, stop: weight[start:stop]
    return lambda start, stop: source.as_exported(
        entry.name, source.folder.read_rows(entry.name, start, stop)
    )


def _read_back(source: Source, model: "PackedModel", say: Say) -> dict[str, int]:
    """Compare every packed site, decoded from the written files, and every other tensor with the model.

    A zero that lost its sign is counted and reported.

    Raises:
        MaskError: a tensor is missing, or a value of a packed site is not the model's.
        FormatError: another tensor is not the model's.
    """
    entries = source.lock.by_name()
    checks = {"bit_exact": 0, "signs_of_zeros_lost": 0, "tensors_equal": 0}
    copied: dict[Path, list[str]] = {}
    for name in source.folder.names:
        if name in model.packed:
            lost = _compare(model.rows(name), _rows(source, entries[name]), model.packed[name])
            checks["signs_of_zeros_lost" if lost else "bit_exact"] += 1
            if lost:
                say(f"warning: {name}: {lost} zeros of negative sign were written as +0")
        elif name in model.where:
            copied.setdefault(model.where[name].path, []).append(name)
        else:
            raise MaskError(f"{name}: is not in the export")
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
    """The tensors of an export whose manifest is checked; each is decoded when it is read.

    Attributes:
        where: the file of each stored tensor.
        packed: the packed sites, by name.
        layouts: of the format.
    """

    where: dict[str, Shard]
    packed: dict[str, TensorRecord]
    layouts: Layouts

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, layouts: Layouts) -> "PackedModel":
        """Check the manifest's records against the files' headers.

        Raises:
            FormatError: a layout that is unknown or not possible; a part that is missing, in another file than the
                first, or of another shape.
        """
        where = open_files(folder, manifest)
        paths = {shard.path for shard in where.values()}
        missing = paths.pop() if len(paths) == 1 else folder
        for index, record in enumerate(manifest.tensors):
            _check_record(record, layouts, f"{folder / MANIFEST}: tensors.{index}")
            specs = specs_of(record, layouts)
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
        packed = {record.name: record for record in manifest.tensors if record.layout != DENSE}
        return cls(where, packed, layouts)

    def file_of(self, name: str) -> Shard:
        """The file that holds a tensor of the model."""
        packed = self.packed.get(name)
        return self.where[specs_of(packed, self.layouts)[0][0] if packed else name]

    def rows(self, name: str) -> Rows:
        """The rows of a packed site.

        Raises (when rows are taken):
            FormatError: the metadata is invalid; names file, site, row and columns.
        """
        shard, record = self.file_of(name), self.packed[name]
        parts = [shard.read(part) for part, _, _ in specs_of(record, self.layouts)]
        m, k = record.shape
        decode = self.layouts[record.layout].rows(parts, (m, k))

        def rows(start: int, stop: int) -> Tensor:
            try:
                return decode(start, stop)
            except FormatError as error:
                raise FormatError(f"{shard.path}: {name}: {error}") from None

        return rows

    def decoded(self) -> Decoded:
        """The model's tensors, as the model stores them."""
        parts = {part for record in self.packed.values() for part, _, _ in specs_of(record, self.layouts)}
        shapes = {name: shard.info(name).shape for name, shard in self.where.items() if name not in parts}
        for name, record in self.packed.items():
            m, k = record.shape
            shapes[name] = (k, m) if record.transposed else (m, k)

        def read(name: str) -> Tensor:
            if name not in self.packed:
                return self.where[name].read(name)
            record = self.packed[name]
            weight = self.rows(name)(0, record.shape[0])
            return weight.t() if record.transposed else weight

        def stored(name: str) -> Shard | None:
            return None if name in self.packed else self.where[name]

        return Decoded(shapes, read, lambda name: self.file_of(name).name, stored)


def _check_record(record: TensorRecord, layouts: Layouts, where: str) -> None:
    if record.layout == DENSE:
        return
    if record.layout not in layouts:
        raise FormatError(
            f"{where}.layout: '{record.layout}', expected one of {', '.join((*layouts, DENSE))}"
        )
    if len(record.shape) != 2 or record.shape[1] % 4:
        raise FormatError(f"{where}.shape: {record.shape} is not a matrix of whole groups of four")
    try:
        dtype = torch_dtype(record.dtype)
    except FormatError as error:
        raise FormatError(f"{where}.dtype: {error}") from None
    if reason := layouts[record.layout].refusal(tuple(record.shape), dtype):
        raise FormatError(f"{where}.layout: '{record.layout}', which is not possible: {reason}")


def decoded_rows(neutral: Packed24, group: int = 4) -> Rows:
    """Dense rows of a 2:4 (group 4) or 1:2 (group 2) weight in its layout-neutral form."""
    unpack = unpack_2_4 if group == 4 else unpack_1_2
    values, positions, (_, k) = neutral.values, neutral.positions, neutral.shape
    return lambda start, stop: unpack(Packed24(values[start:stop], positions[start:stop]), k, start)
