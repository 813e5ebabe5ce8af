"""Reading exports whose sites are packed into one safetensors file, whatever the layout.

A format says in `Layouts` which tensors store a site and how rows come out of them; what every such format
must check of a file, and what it offers `verify`, `unpack` and the runtime, is here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.format import Decoded, Weights
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord
from spp_fx.exporters.semi_structured import Packed24, in_parallel, kernels, row_chunks, unpack_2_4
from spp_fx.sparsity.scan import Scan, scan_stored, scan_tensor
from spp_fx.storage.safetensors import Shard, TensorInfo, torch_dtype
from spp_fx.storage.writer import TensorSpec

WEIGHTS = "packed.safetensors"
"""No name that loaders of plain models look for: transformers would fill the packed weights at random."""
DENSE = "dense"

Rows = Callable[[int, int], Tensor]
"""Rows start <= i < stop of a canonical (out, in) weight."""

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layouts:
    """The packed layouts of a format.

    Attributes:
        parts: name -> the tensors that store a site of this shape (out, in) and dtype; their names come
            after the site's and a dot.
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


@dataclass(frozen=True)
class PackedModel:
    """The weights of such an export; its manifest is checked, its tensors are decoded when asked for.

    Attributes:
        shard: the file.
        records: the sites, by name.
        layouts: of the format.
    """

    shard: Shard
    records: dict[str, TensorRecord]
    layouts: Layouts

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, layouts: Layouts) -> "PackedModel":
        """Hold the manifest's records and the file's header to one another.

        Raises:
            FormatError: a layout that is unknown or cannot be; a part that is missing or of another shape.
        """
        shard = Shard.open(folder / WEIGHTS)
        for index, record in enumerate(manifest.tensors):
            _check_record(record, layouts, f"{folder / MANIFEST}: tensors.{index}")
            if record.layout == DENSE:
                _find(shard, record.name)
            for part, dtype, shape in layouts.specs(record):
                info = _find(shard, part)
                if info.dtype != dtype or info.shape != shape:
                    raise FormatError(
                        f"{shard.path}: {part} is {info.dtype} {list(info.shape)}, "
                        f"expected {dtype} {list(shape)}"
                    )
        return cls(shard, {record.name: record for record in manifest.tensors}, layouts)

    def rows(self, name: str) -> Rows:
        """The rows of a packed site.

        Raises (when rows are taken):
            FormatError: the metadata is none; names file, site, row and columns.
        """
        decode = self.layouts.rows(self.shard, self.records[name])

        def rows(start: int, stop: int) -> Tensor:
            try:
                return decode(start, stop)
            except FormatError as error:
                raise FormatError(f"{self.shard.path}: {name}: {error}") from None

        return rows

    def weight(self, name: str) -> Tensor:
        """A site's canonical weight."""
        record = self.records[name]
        if record.layout == DENSE:
            stored = self.shard.read(name)
            return stored.transpose(-1, -2) if record.transposed else stored
        return self.rows(name)(0, record.shape[0])

    def weights(self) -> Weights:
        """What `verify` looks at."""

        def scan(name: str, transposed: bool) -> Scan:
            if name not in self.records or self.records[name].layout == DENSE:
                return scan_stored(self.shard, name, transposed=transposed)
            return scan_tensor(self.weight(name))

        sites = {name: record.transposed for name, record in self.records.items()}
        return Weights(frozenset(self.decoded().shapes), scan, lambda _: self.shard.name, lambda: sites)

    def decoded(self) -> Decoded:
        """The model's tensors, as the model stores them."""
        packed = [record for record in self.records.values() if record.layout != DENSE]
        parts = {part for record in packed for part, _, _ in self.layouts.specs(record)}
        shapes = {name: info.shape for name, info in self.shard.header.tensors.items() if name not in parts}
        for record in packed:
            m, k = record.shape
            shapes[record.name] = (k, m) if record.transposed else (m, k)

        def read(name: str) -> Tensor:
            record = self.records.get(name)
            if record is None or record.layout == DENSE:
                return self.shard.read(name)
            weight = self.weight(name)
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


def _find(shard: Shard, name: str) -> TensorInfo:
    info = shard.header.tensors.get(name)
    if info is None:
        raise FormatError(f"{shard.path}: holds no tensor {name}, {MANIFEST} says it does")
    return info


def gather(meta: Tensor, rows: Places, groups: Places) -> Tensor:
    """Positions in row-major order, from metadata in another.

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
        place = rows[start:stop, None] + groups
        found = data[place >> 1] >> ((place & 1) << 2).astype(np.uint8) & 0xF
        positions[start:stop] = torch.from_numpy(found[:, 0::2] | found[:, 1::2] << 4)

    in_parallel(work, row_chunks(len(rows), 4 * len(groups)))
    return positions


def neutral_rows(neutral: Packed24) -> Rows:
    """Rows of a weight in its layout-neutral form."""
    values, positions, (_, k) = neutral.values, neutral.positions, neutral.shape
    return lambda start, stop: unpack_2_4(Packed24(values[start:stop], positions[start:stop]), k, start)
