"""sparse-bitmask: any sparse model in compact safetensors that give its folder back bit for bit.

The folder `sparse/` of the export mirrors the weight files of the model one to one, under their names: no
server looks there, so that none loads values for weights. For each site NAME such a file holds

| tensor       | shape             | dtype        | what                                                     |
|--------------|-------------------|--------------|----------------------------------------------------------|
| NAME.values  | [nnz]             | the weight's | elements whose bits are not all zero, in stored order    |
| NAME.bitmask | [ceil(numel / 8)] | uint8        | which they are, flat in stored order, LSB first          |

and every other tensor as it is; `__metadata__` holds the header of the model's file as it was. The whole
specification is docs/sparse-bitmask.md.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spp_fx.exporters.bitmask import Bytes, kernels, unsigned
from spp_fx.exporters.format import ExportSettings, Format, Say, Source, Tick, register
from spp_fx.exporters.manifest import MANIFEST, TensorRecord, site_sizes, write_manifest
from spp_fx.exporters.raw_file import (
    SPAN,
    RawTensor,
    copy_spans,
    header_bytes,
    layout,
    read_span,
    spans,
    write_raw,
)
from spp_fx.exporters.sparse_bitmask_check import check_written
from spp_fx.exporters.sparse_bitmask_reader import FOLDER, NAME, VERSION, decode, read, restore
from spp_fx.parallel import in_order
from spp_fx.sparsity.kernels import element_type, scanner
from spp_fx.sparsity.lock import LOCK_NAME, LockEntry
from spp_fx.storage.safetensors import Shard, TensorInfo
from spp_fx.storage.writer import copy_file, write_shards
from spp_fx.version import VERSION as SPP_FX_VERSION


@dataclass(frozen=True)
class _Site:
    """A site about to be written: its values counted, its bitmask waiting at `offset` of a spool."""

    info: TensorInfo
    itemsize: int
    nnz: int
    offset: int

    @property
    def mask_bytes(self) -> int:
        return -(-self.info.nbytes // (8 * self.itemsize))

    @property
    def nbytes(self) -> int:
        return self.nnz * self.itemsize + self.mask_bytes


def write(source: Source, target: Path, settings: ExportSettings, tick: Tick, say: Say) -> dict[str, Any]:
    del settings, say

    def write_one(shard: Shard, file: Path) -> dict[str, Any]:
        written = write_shard(source, shard, file, tick)
        return {"records": [record.model_dump(mode="json") for record in written.values()]}

    files = write_shards(source.folder, target / FOLDER, write_one, source.work)
    every = (TensorRecord.model_validate(record) for facts in files for record in facts["records"])
    records = {record.name: record for record in every}
    # A manifest of the model would be one of another export.
    own = [name.as_posix() for name in source.folder.other_files() if name.as_posix() != MANIFEST]
    places = {name: target / name for name in own}
    if source.folder.index is not None:
        places[source.folder.index] = target / FOLDER / source.folder.index
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.folder.path / name, place)
    if LOCK_NAME not in own:
        (target / LOCK_NAME).write_text(source.lock.dumps())
    packed = [record for record in records.values() if record.layout == "bitmask"]
    unpacked = sum(record.dense_bytes for record in records.values() if record.layout == "dense")
    write_manifest(
        target,
        spp_fx_version=SPP_FX_VERSION,
        format=NAME,
        pattern=source.lock.pattern,
        requirements={"version": VERSION, "model_has_lock": int(LOCK_NAME in own)},
        tensors=[records[entry.name] for entry in source.lock.sites],
        sizes=site_sizes(
            sum(record.dense_bytes for record in records.values()),
            unpacked + sum(int(record.details["bytes"]) for record in packed),
            (target / FOLDER).rglob("*.safetensors"),
        ),
    )
    return check_written(source.folder, target / FOLDER, {record.name for record in packed})


def write_shard(source: Source, shard: Shard, target: Path, tick: Tick) -> dict[str, TensorRecord]:
    """Write the compact form of one weight file; returns the records of its sites."""
    records: dict[str, TensorRecord] = {}
    tensors: list[RawTensor] = []
    entries = source.lock.by_name()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as spool:
        for name, info in shard.header.tensors.items():
            entry = entries.get(name)
            site = None if entry is None else _count(shard, info, spool)
            if entry is not None and site is not None:
                records[name] = _record(source, entry, site, shard)
            if site is None or records[name].layout == "dense":
                blocks = partial(_copy, shard, info, tick)
                tensors.append(RawTensor(name, info.dtype, info.shape, info.nbytes, blocks))
            else:
                tensors += _parts(shard, site, spool, tick)
        ordered = layout(tensors)
        metadata = {"format": NAME, "version": str(VERSION), "header": shard.header.raw[8:].decode()}
        header = header_bytes(ordered, metadata, target)
        write_raw(target, header, (block for tensor in ordered for block in tensor.blocks()))
    return records


def _count(shard: Shard, info: TensorInfo, spool: BinaryIO) -> _Site:
    """Count the values of a site; its bitmask goes to the end of the spool."""
    itemsize, offset, nnz = element_type(info.dtype).itemsize, spool.tell(), 0
    every_bit, scan = element_type(f"U{8 * itemsize}"), scanner(itemsize)

    def look(span: tuple[int, int]) -> tuple[int, Bytes]:
        start, stop = span
        elements = unsigned(read_span(shard.path, info.start + start, stop - start), itemsize)
        mask = np.empty(-(-elements.size // 8), dtype=np.uint8)
        return scan(elements, every_bit, mask)[0], mask

    for count, mask in in_order(look, spans(info.nbytes, SPAN)):
        nnz += count
        spool.write(mask.data)
    return _Site(info, itemsize, nnz, offset)


def _record(source: Source, entry: LockEntry, site: _Site, shard: Shard) -> TensorRecord:
    reason = None
    taken = [part for part in ("values", "bitmask") if f"{entry.name}.{part}" in shard.header.tensors]
    if taken:
        reason = f"its file has a tensor of the name {entry.name}.{taken[0]}"
    elif site.nbytes >= site.info.nbytes:
        reason = "values and bitmask would take no less than the dense weight"
    if reason is not None:
        return source.record(entry, "dense", reason)
    return source.record(entry, "bitmask", details={"values": site.nnz, "bytes": site.nbytes})


def _parts(shard: Shard, site: _Site, spool: BinaryIO, tick: Tick) -> Iterator[RawTensor]:
    name, info = site.info.name, site.info

    def bitmask() -> Iterator[Bytes]:
        spool.seek(site.offset)
        yield np.frombuffer(spool.read(site.mask_bytes), dtype=np.uint8)

    yield RawTensor(
        f"{name}.values",
        info.dtype,
        (site.nnz,),
        site.nnz * site.itemsize,
        partial(_values, shard, site, tick),
    )
    yield RawTensor(f"{name}.bitmask", "U8", (site.mask_bytes,), site.mask_bytes, bitmask)


def _values(shard: Shard, site: _Site, tick: Tick) -> Iterator[Bytes]:
    """The values of a site, span by span, each compressed by a thread of its own."""
    compress = kernels().compress

    def kept(span: tuple[int, int]) -> Bytes:
        start, stop = span
        elements = unsigned(read_span(shard.path, site.info.start + start, stop - start), site.itemsize)
        values = np.empty_like(elements)
        return values[: compress(elements, values)].view(np.uint8)

    yield from in_order(kept, spans(site.info.nbytes, SPAN))
    tick(site.info.name, site.info.nbytes)


def _copy(shard: Shard, info: TensorInfo, tick: Tick) -> Iterator[Bytes]:
    yield from copy_spans(shard.path, info.start, info.nbytes)
    tick(info.name, info.nbytes)


FORMAT = register(Format(NAME, write, read, decode=decode, restore=restore))
