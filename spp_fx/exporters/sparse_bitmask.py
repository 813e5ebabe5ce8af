"""sparse-bitmask: any sparse model in compact safetensors that give its folder back bit for bit.

The folder `sparse/` of the export has a compact file for each weight file of the model, under the same name. No
server looks into that folder, so none loads values as weights. For each site NAME such a file holds

| tensor       | shape             | dtype        | what                                                     |
|--------------|-------------------|--------------|----------------------------------------------------------|
| NAME.values  | [nnz]             | the weight's | elements whose bits are not all zero, in stored order    |
| NAME.bitmask | [ceil(numel / 8)] | uint8        | their positions, flat in stored order, LSB first         |

and every other tensor as it is; `__metadata__` holds the header of the model's file. docs/sparse-bitmask.md is the
specification.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.format import Decoded, Format, Say, Source, TensorFile, Tick, new_tensor_file, register
from spp_fx.exporters.manifest import COMPACT, MANIFEST, Manifest, TensorRecord, site_sizes
from spp_fx.exporters.read_back import LibraryReader, check_copied
from spp_fx.parallel import in_order
from spp_fx.sparsity.kernels import popcount
from spp_fx.sparsity.lock import LOCK_NAME, LockEntry
from spp_fx.sparsity.packing import compress, expand
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import BITS, Header, Shard, TensorInfo, parse_header, torch_dtype, torch_shape
from spp_fx.storage.strict_json import shown
from spp_fx.storage.writer import TensorSpec, copy_file, new_file, write_all, write_shards

NAME = "sparse-bitmask"
VERSION = 1
SPAN = 2 << 20
"""Bytes of a tensor that one task works on: worth a task of a thread, and small against a cache."""

_CHECKED_ELEMENTS = 1 << 20

Bytes = NDArray[np.uint8]


def spans(count: int, step: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive spans of at most `step` that cover `count`."""
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def read_span(shard: Shard, name: str, start: int, stop: int) -> Bytes:
    """Bytes start <= i < stop of a stored tensor."""
    return np.frombuffer(shard.read_bytes(name, start, stop - start), dtype=np.uint8)


def unsigned(data: Bytes, itemsize: int) -> NDArray[Any]:
    """Bytes as little-endian elements of a width in bytes."""
    return data.view(np.dtype(f"<u{itemsize}"))


@register("sparse-bitmask")
@dataclass(frozen=True)
class SparseBitmask(Format):
    """Values and bit masks: compact, any pattern, given back bit for bit by 'spp-fx unpack'."""

    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        def write_one(shard: Shard, file: Path) -> dict[str, Any]:
            written = write_shard(source, shard, file, tick)
            return {"records": [record.model_dump(mode="json") for record in written.values()]}

        files = write_shards(source.folder, folder / COMPACT, write_one, source.work)
        written = [TensorRecord.model_validate(record) for facts in files for record in facts["records"]]
        records = {record.name: record for record in written}
        if source.folder.index is not None:
            copy_file(source.folder.path / source.folder.index, folder / COMPACT / source.folder.index)
        source.copy_small_files(folder)
        has_lock = (source.folder.path / LOCK_NAME).is_file()
        if has_lock:
            copy_file(source.folder.path / LOCK_NAME, folder / LOCK_NAME)  # `unpack` gives back its bytes
        sizes = site_sizes(
            sum(record.dense_bytes for record in records.values()),
            sum(int(r.details.get("bytes", r.dense_bytes)) for r in records.values()),
            (folder / COMPACT).rglob("*.safetensors"),
        )
        every = [records[entry.name] for entry in source.lock.sites]
        requirements: dict[str, int | str] = {"version": VERSION, "model_has_lock": int(has_lock)}
        source.finish(folder, NAME, every, requirements=requirements, sizes=sizes)
        packed = {name for name, record in records.items() if record.layout == "bitmask"}
        return _check_written(source.folder, folder / COMPACT, packed)

    @classmethod
    def decode(cls, folder: Path, manifest: Manifest) -> Decoded:
        where = {name: shard for shard in open_shards(folder, manifest) for name in shard.tensors}
        shapes = {name: shard.tensors[name].shape for name, shard in where.items()}

        def stored(name: str) -> Shard | None:
            return None if name in where[name].packed else where[name].shard

        return Decoded(
            shapes, lambda name: where[name].read(name), lambda name: where[name].shard.name, stored
        )

    @classmethod
    def restore(cls, folder: Path, manifest: Manifest, target: Path, tick: Tick) -> bool:
        for compact in open_shards(folder, manifest):
            path = within(target, compact.shard.name.removeprefix(f"{COMPACT}/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as out:
                write_all(out, memoryview(compact.original.raw))
                for name, info in compact.tensors.items():
                    for block in compact.blocks(name):
                        write_all(out, block.data)
                    tick(name, info.nbytes)
        for name in manifest.files:
            if _is_weight_file(name) and name.endswith(".index.json"):
                copy_file(within(folder, name), within(target, name.removeprefix(f"{COMPACT}/")))
        return True


# Writing


def write_shard(source: Source, shard: Shard, target: Path, tick: Tick) -> dict[str, TensorRecord]:
    """Write the compact form of one weight file; returns the records of its sites."""
    target.parent.mkdir(parents=True, exist_ok=True)
    entries = source.lock.by_name()
    records: dict[str, TensorRecord] = {}
    specs: list[TensorSpec] = []
    for name, info in shard.header.tensors.items():
        if name in entries:
            records[name] = _record(source, entries[name], shard)
        if name in records and records[name].layout == "bitmask":
            specs.append((f"{name}.values", info.dtype, (int(records[name].details["values"]),)))
            specs.append((f"{name}.bitmask", "U8", (_mask_bytes(info),)))
        else:
            specs.append((name, info.dtype, info.shape))
    metadata = {"format": NAME, "version": str(VERSION), "header": shard.header.raw[8:].decode()}
    with new_tensor_file(target, specs, metadata) as file:
        for name, info in shard.header.tensors.items():
            if name in file.spans:
                for start, stop in spans(info.nbytes, SPAN):
                    file.write_bytes(name, read_span(shard, name, start, stop), start)
            else:
                _write_site(shard, info, file)
            tick(name, info.nbytes)
    return records


def _mask_bytes(info: TensorInfo) -> int:
    return -(-prod(info.shape) // 8)


def _record(source: Source, entry: LockEntry, shard: Shard) -> TensorRecord:
    info = shard.info(entry.name)
    itemsize = BITS[info.dtype] // 8

    def count(span: tuple[int, int]) -> int:
        return int(np.count_nonzero(unsigned(read_span(shard, entry.name, *span), itemsize)))

    values = sum(in_order(count, spans(info.nbytes, SPAN)))
    nbytes = values * itemsize + _mask_bytes(info)
    for part in ("values", "bitmask"):
        if f"{entry.name}.{part}" in shard.header.tensors:
            return source.record(entry, "dense", f"its file has a tensor of the name {entry.name}.{part}")
    if nbytes >= info.nbytes:
        reason = "values and bitmask would take no less than the dense weight"
        return source.record(entry, "dense", reason)
    return source.record(entry, "bitmask", details={"values": values, "bytes": nbytes})


def _write_site(shard: Shard, info: TensorInfo, file: TensorFile) -> None:
    """Write values and bitmask of a site, span by span, each compressed by a thread of its own."""
    itemsize = BITS[info.dtype] // 8

    def packed(span: tuple[int, int]) -> tuple[Bytes, Bytes]:
        elements = unsigned(read_span(shard, info.name, *span), itemsize)
        bits = np.empty(-(-elements.size // 8), dtype=np.uint8)
        return compress(elements, bits).view(np.uint8), bits

    ends = {"values": 0, "bitmask": 0}
    for parts in in_order(packed, spans(info.nbytes, SPAN)):
        for part, data in zip(ends, parts, strict=True):
            file.write_bytes(f"{info.name}.{part}", data, ends[part])
            ends[part] += data.size


def _check_written(model: ModelFolder, folder: Path, packed: Set[str]) -> dict[str, int]:
    """Compare every tensor of compact weight files with the model's, bit for bit.

    The safetensors library reads both sides, and numpy alone decodes: nothing here is shared with the writer.

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
        if library.metadata(written).get("header", "").encode() != header:
            raise FormatError(f"{written}: does not hold the header of {shard.path}")
        for name in sorted(packed & shard.header.tensors.keys()):
            values, bits = (library.read(written, f"{name}.{part}") for part in ("values", "bitmask"))
            _check_site(values, bits, library.read(shard.path, name), f"{written}: {name}")
            counts["bit_exact"] += 1
        others = [name for name in shard.header.tensors if name not in packed]
        counts["tensors_equal"] += check_copied(model, others, written)
    return counts


def _check_site(values: Tensor, bits: Tensor, weight: Tensor, where: str) -> None:
    """Check that the weight holds the values where the mask has ones, and zero bits elsewhere."""
    kind = np.dtype(f"<u{weight.element_size()}")
    kept, stored = (t.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind) for t in (values, weight))
    mask = np.asarray(bits.numpy())
    blocks = [
        (start, min(start + _CHECKED_ELEMENTS, stored.size))
        for start in range(0, stored.size, _CHECKED_ELEMENTS)
    ]
    counts = [int(np.bitwise_count(mask[a // 8 : -(-b // 8)]).sum(dtype=np.int64)) for a, b in blocks]
    starts = list(accumulate(counts, initial=0))
    if values.dtype != weight.dtype or starts[-1] != kept.size:
        raise FormatError(f"{where}: {kept.size} values of {values.dtype}, {starts[-1]} ones of its bitmask")

    def same(block_and_values: tuple[tuple[int, int], tuple[int, int]]) -> bool:
        (start, stop), (first, last) = block_and_values
        block, here = stored[start:stop], kept[first:last]
        ones = np.unpackbits(mask[start // 8 :], count=block.size, bitorder="little").view(np.bool_)
        return np.array_equal(block[ones], here) and np.count_nonzero(block) == np.count_nonzero(here)

    for (start, stop), equal in zip(
        blocks, in_order(same, zip(blocks, pairwise(starts), strict=True)), strict=True
    ):
        if not equal:
            raise FormatError(f"{where}: elements {start} to {stop - 1} are not the model's")


# Reading


@dataclass(frozen=True)
class CompactShard:
    """A compact weight file whose header was checked to describe the model's file in full.

    Attributes:
        shard: the compact file.
        original: the header of the model's file.
        packed: the tensors that are stored as values and bitmask.
    """

    shard: Shard
    original: Header
    packed: frozenset[str]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the model's file, in its order."""
        return self.original.tensors

    @classmethod
    def open(cls, path: Path, name: str) -> "CompactShard":
        """Check the headers; no tensor is read.

        Raises:
            FormatError: names the file, the tensor and the fault.
        """
        shard = Shard.open(path, name)
        original = _original(shard)
        packed = frozenset(original.tensors.keys() - shard.header.tensors.keys())
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for info in original.tensors.values():
            if info.name not in packed:
                expected[info.name] = info.dtype, info.shape
                continue
            values = shard.header.tensors.get(f"{info.name}.values")
            if values is None:
                raise FormatError(f"{path}: {shown(info.name)}: neither it nor its values are in the file")
            if BITS[info.dtype] % 8:
                raise FormatError(f"{path}: {shown(info.name)}: {info.dtype} does not take whole bytes")
            expected[values.name] = info.dtype, (prod(values.shape),)
            expected[f"{info.name}.bitmask"] = "U8", (-(-prod(info.shape) // 8),)
        for part, (dtype, shape) in expected.items():
            found = shard.header.tensors.get(part)
            if found is None or (found.dtype, found.shape) != (dtype, shape):
                what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise FormatError(f"{path}: {shown(part)}: {what}, expected {dtype} {list(shape)}")
        if stray := shard.header.tensors.keys() - expected.keys():
            raise FormatError(f"{path}: {shown(min(stray))}: is not a tensor of the model, nor a part of one")
        return cls(shard, original, packed)

    def holds_the_same(self, other: "CompactShard", name: str) -> bool:
        """Whether two files hold the same bytes of a tensor, which a model may store twice."""
        if (name in self.packed) != (name in other.packed):
            return False
        parts = (f"{name}.values", f"{name}.bitmask") if name in self.packed else (name,)
        same = self.tensors[name].shape == other.tensors[name].shape
        return same and all(self.shard.difference(other.shard, part) is None for part in parts)

    def blocks(self, name: str) -> Iterator[Bytes]:
        """The bytes of a tensor as the model's file holds them.

        Raises:
            FormatError: values and bitmask do not belong together; names the file and the tensor.
        """
        if name not in self.packed:
            for span in spans(self.tensors[name].nbytes, SPAN):
                yield read_span(self.shard, name, *span)
            return
        where = f"{self.shard.path}: {shown(name)}"
        itemsize = BITS[self.tensors[name].dtype] // 8
        numel = prod(self.tensors[name].shape)
        mask = read_span(self.shard, f"{name}.bitmask", 0, -(-numel // 8))
        values_bytes = self.shard.info(f"{name}.values").nbytes
        if numel % 8 and int(mask[-1]) >> numel % 8:
            raise FormatError(f"{where}: its bitmask has bits set past the last of {numel} elements")
        blocks = spans(numel, SPAN // itemsize)
        counts = [popcount(mask[start // 8 : -(-stop // 8)]) for start, stop in blocks]
        starts = list(accumulate(counts, initial=0))
        if starts[-1] * itemsize != values_bytes:
            raise FormatError(
                f"{where}: its bitmask has {starts[-1]} ones for {values_bytes // itemsize} values"
            )

        def expanded(block_and_values: tuple[tuple[int, int], tuple[int, int]]) -> Bytes:
            (start, stop), (first, last) = block_and_values
            span = read_span(self.shard, f"{name}.values", first * itemsize, last * itemsize)
            kept = unsigned(span, itemsize)
            if not kept.all():
                raise FormatError(f"{where}: value {first + int((kept == 0).argmax())} has no bit set")
            elements = np.empty(stop - start, dtype=kept.dtype)
            expand(mask[start // 8 :], kept, elements)
            return elements.view(np.uint8)

        yield from in_order(expanded, zip(blocks, pairwise(starts), strict=True))

    def read(self, name: str) -> Tensor:
        """A tensor as the model stores it; FormatError as for `blocks`, or a dtype that torch has not."""
        info = self.tensors[name]
        if name not in self.packed:
            return self.shard.read(name)
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        target, done = data.numpy(), 0
        for block in self.blocks(name):
            target[done : done + block.size] = block
            done += block.size
        shape = torch_shape(info.dtype, info.shape)
        return data.view(torch_dtype(info.dtype)).reshape(shape)


def _original(shard: Shard) -> Header:
    """The header of the model's file, from the metadata of the compact one."""
    where, metadata = f"{shard.path}: __metadata__", shard.header.metadata
    if metadata.get("format") != NAME or metadata.get("version") != str(VERSION):
        raise FormatError(f"{where}: is not that of {NAME}, version {VERSION}")
    text = metadata.get("header", "").encode()
    return parse_header(len(text).to_bytes(8, "little") + text, f"{where}.header")


def open_shards(folder: Path, manifest: Manifest) -> list[CompactShard]:
    """Every compact weight file of an export.

    Raises:
        FormatError: there is none, a tensor is in two of them and not the same, or the manifest says something else
            of a site.
    """
    path = folder / MANIFEST
    if manifest.requirements.get("version") != VERSION:
        found = manifest.requirements.get("version")
        raise FormatError(f"{path}: requirements.version: {found!r}, this release reads {VERSION}")
    names = [name for name in manifest.files if _is_weight_file(name) and name.endswith(".safetensors")]
    if not names:
        raise FormatError(f"{path}: files: names no weight file in {COMPACT}/")
    shards = [CompactShard.open(within(folder, name), name) for name in names]
    where: dict[str, CompactShard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in where and not shard.holds_the_same(where[name], name):
                raise FormatError(
                    f"{shard.shard.path}: {shown(name)}: is in {where[name].shard.path} too, and not the same"
                )
            where[name] = shard
    for index, record in enumerate(manifest.tensors):
        shard = where.get(record.name)
        if shard is None:
            continue
        info, layout = shard.tensors[record.name], "bitmask" if record.name in shard.packed else "dense"
        if (record.layout, record.dtype) != (layout, info.dtype):
            raise FormatError(
                f"{path}: tensors.{index}: {record.layout} {record.dtype}, "
                f"{shard.shard.path} has it as {layout} {info.dtype}"
            )
    return shards


def _is_weight_file(name: str) -> bool:
    return name.startswith(f"{COMPACT}/") and name.endswith((".safetensors", ".safetensors.index.json"))
