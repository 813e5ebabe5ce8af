"""Reading a sparse-bitmask export: checked in full, decoded span by span, restored byte for byte."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.bitmask import Bytes, kernels, ones, unsigned
from spp_fx.exporters.format import Decoded, Tick, Weights
from spp_fx.exporters.manifest import COMPACT, MANIFEST, Manifest
from spp_fx.exporters.raw_file import SPAN, copy_spans, read_span, spans, write_raw
from spp_fx.parallel import in_order
from spp_fx.sparsity.scan import Scan, scan_stored, scan_tensor
from spp_fx.storage.folder import within
from spp_fx.storage.safetensors import BITS, Shard, TensorInfo, stored_nbytes, torch_dtype, torch_shape
from spp_fx.storage.strict_json import parse_object, shown
from spp_fx.storage.writer import copy_file

NAME = "sparse-bitmask"
VERSION = 1
FOLDER = COMPACT
"""The folder of an export that mirrors the weight files of the model."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """A tensor in the header of a safetensors file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: Annotated[list[_Count], Field(max_length=64)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class CompactShard:
    """A compact weight file whose header is known to describe the model's file in full.

    Attributes:
        shard: the compact file.
        header: the bytes of the model's file before its tensors.
        tensors: those of the model's file, in its order.
        packed: the tensors that are stored as values and bitmask.
    """

    shard: Shard
    header: bytes
    tensors: dict[str, TensorInfo]
    packed: frozenset[str]

    @classmethod
    def open(cls, path: Path, name: str) -> "CompactShard":
        """Check the headers; no tensor is read.

        Raises:
            FormatError: names the file, the tensor and the fault.
        """
        shard = Shard.open(path, name)
        header, tensors = _original(shard)
        packed = frozenset(tensors.keys() - shard.header.tensors.keys())
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for info in tensors.values():
            if info.name not in packed:
                expected[info.name] = info.dtype, info.shape
                continue
            values = shard.header.tensors.get(f"{info.name}.values")
            if values is None:
                raise FormatError(f"{path}: {shown(info.name)}: neither it nor its values are in the file")
            if BITS[info.dtype] % 8:
                raise FormatError(f"{path}: {shown(info.name)}: an element of {info.dtype} is no whole byte")
            expected[values.name] = info.dtype, (prod(values.shape),)
            expected[f"{info.name}.bitmask"] = "U8", (-(-prod(info.shape) // 8),)
        for part, (dtype, shape) in expected.items():
            found = shard.header.tensors.get(part)
            if found is None or (found.dtype, found.shape) != (dtype, shape):
                what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise FormatError(f"{path}: {shown(part)}: {what}, expected {dtype} {list(shape)}")
        if stray := shard.header.tensors.keys() - expected.keys():
            raise FormatError(f"{path}: {shown(min(stray))}: is no tensor of the model, nor a part of one")
        return cls(shard, header, tensors, packed)

    def holds_the_same(self, other: "CompactShard", name: str) -> bool:
        """Whether two files hold a tensor of both in the same bytes, as a model may that is stored so."""
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
            info = self.shard.info(name)
            yield from copy_spans(self.shard.path, info.start, info.nbytes)
            return
        where = f"{self.shard.path}: {shown(name)}"
        itemsize = BITS[self.tensors[name].dtype] // 8
        numel = prod(self.tensors[name].shape)
        bits, values = (self.shard.info(f"{name}.{part}") for part in ("bitmask", "values"))
        mask = read_span(self.shard.path, bits.start, bits.nbytes)
        if numel % 8 and int(mask[-1]) >> numel % 8:
            raise FormatError(f"{where}: its bitmask has bits set past the last of {numel} elements")
        pieces = spans(numel, SPAN // itemsize)
        counts = [ones(mask[start // 8 : -(-stop // 8)]) for start, stop in pieces]
        starts = list(accumulate(counts, initial=0))
        if starts[-1] * itemsize != values.nbytes:
            raise FormatError(
                f"{where}: its bitmask has {starts[-1]} ones for {values.nbytes // itemsize} values"
            )

        def expanded(piece: tuple[tuple[int, int], tuple[int, int]]) -> Bytes:
            (start, stop), (first, last) = piece
            span = read_span(self.shard.path, values.start + first * itemsize, (last - first) * itemsize)
            kept = unsigned(span, itemsize)
            if not kept.all():
                raise FormatError(f"{where}: value {first + int((kept == 0).argmax())} has no bit set")
            elements = np.empty(stop - start, dtype=kept.dtype)
            kernels().expand(mask[start // 8 :], kept, elements)
            return elements.view(np.uint8)

        yield from in_order(expanded, zip(pieces, pairwise(starts), strict=True))

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


def _original(shard: Shard) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of the model's file and what it says, from the metadata of the compact one."""
    where, metadata = f"{shard.path}: __metadata__", shard.header.metadata
    if metadata.get("format") != NAME or metadata.get("version") != str(VERSION):
        raise FormatError(f"{where}: is not that of {NAME}, version {VERSION}")
    raw = metadata.get("header", "").encode()
    entries = parse_object(raw, f"{where}.header")
    entries.pop("__metadata__", None)
    try:
        checked = _ENTRIES.validate_python(entries)
    except ValidationError as error:
        fault = error.errors()[0]
        raise FormatError(f"{where}.header: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, entry in sorted(checked.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        tensor = f"{where}.header: {shown(name)}"
        if entry.dtype not in BITS:
            raise FormatError(f"{tensor}: unknown dtype {shown(entry.dtype)}")
        shape = tuple(entry.shape)
        if start != position or end - start != stored_nbytes(entry.dtype, shape, tensor):
            raise FormatError(f"{tensor}: its offsets do not follow from the tensors before it and its shape")
        begin = 8 + len(raw)
        tensors[name] = TensorInfo(name, entry.dtype, shape, begin + start, begin + end)
        position = end
    return len(raw).to_bytes(8, "little") + raw, tensors


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
        raise FormatError(f"{path}: files: names no weight file in {FOLDER}/")
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
        info, layout = (
            shard.tensors[record.name],
            "bitmask" if record.name in shard.packed else "dense",
        )
        if (record.layout, record.dtype) != (layout, info.dtype):
            raise FormatError(
                f"{path}: tensors.{index}: {record.layout} {record.dtype}, "
                f"{shard.shard.path} has it as {layout} {info.dtype}"
            )
    return shards


def _is_weight_file(name: str) -> bool:
    return name.startswith(f"{FOLDER}/") and name.endswith((".safetensors", ".safetensors.index.json"))


def read(folder: Path, manifest: Manifest) -> Weights:
    """The weights of an export, decoded from values and bitmask."""
    where = {name: shard for shard in open_shards(folder, manifest) for name in shard.tensors}

    def scan(name: str, transposed: bool) -> Scan:
        shard = where[name]
        if name not in shard.packed:
            return scan_stored(shard.shard, name, transposed=transposed)
        return scan_tensor(shard.read(name), transposed=transposed)

    sites = {record.name: record.transposed for record in manifest.tensors}
    return Weights(frozenset(where), scan, lambda name: where[name].shard.name, lambda: sites)


def decode(folder: Path, manifest: Manifest) -> Decoded:
    """The tensors of the model, bit for bit."""
    where = {name: shard for shard in open_shards(folder, manifest) for name in shard.tensors}
    shapes = {name: shard.tensors[name].shape for name, shard in where.items()}
    return Decoded(shapes, lambda name: where[name].read(name))


def restore(folder: Path, manifest: Manifest, target: Path, tick: Tick) -> None:
    """Write the weight files of the model, and their index, byte for byte as they were."""
    for compact in open_shards(folder, manifest):

        def blocks(compact: CompactShard = compact) -> Iterator[Bytes]:
            for name, info in compact.tensors.items():
                yield from compact.blocks(name)
                tick(name, info.nbytes)

        write_raw(within(target, compact.shard.name.removeprefix(f"{FOLDER}/")), compact.header, blocks())
    for name in manifest.files:
        if _is_weight_file(name) and name.endswith(".index.json"):
            place = within(target, name.removeprefix(f"{FOLDER}/"))
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(within(folder, name), place)
