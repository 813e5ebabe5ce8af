"""Export formats: the contract, the registry, the model that an export is written from, files filled in any order.

How far a reader is independent of its writer:

- safetensors: every tensor is compared with the model's byte for byte, both read by the safetensors library.
- cusparselt, cutlass: packs are decoded through tables of offsets (`cusparselt_reader`, `cutlass_reader`), which
  the writers never compute, and compared with the model's weights; other tensors are compared as in safetensors.
  Where `--dtype` rounds, the same function computes the rounded values once more.
- sparse-bitmask: files are read by the safetensors library and decoded by numpy alone.
- onnx, onnx-packed, onnx-dense: a parser of their own reads the weights, which are compared with the model's bit
  for bit; small graphs are run and their logits compared.

The scan for zeros (`spp_fx.sparsity`) and the reader of safetensors headers serve both sides everywhere.
"""

import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_fx.adapters.fold import round_once
from spp_fx.errors import MaskError
from spp_fx.exporters.export_settings import ExportSettings
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord, write_manifest
from spp_fx.parallel import Tick
from spp_fx.registry import Registry
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry
from spp_fx.sparsity.scan import Scan, scan_tensor
from spp_fx.sparsity.weights import Sites, Weights
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import dtype_name, stored_nbytes
from spp_fx.storage.workspace import Workspace
from spp_fx.storage.writer import TensorSpec, copy_file, header_bytes, layout, new_file, write_all
from spp_fx.version import VERSION

ROUND_TO = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What `--dtype` rounds to."""
ROUNDED = ("F64", "F32", "F16", "BF16")
"""What `--dtype` rounds; integers and the types of quantized weights stay byte for byte."""
_CHUNK = 1 << 20
"""Elements rounded at a time: temporaries stay in cache, and memory never holds the weight twice."""


@dataclass(frozen=True)
class Source:
    """A model folder to export, and the masks that the export must have.

    Attributes:
        folder: the model's folder.
        lock: of its sparse weights.
        trust_remote_code: whether the folder's own model code may run.
        rounded_to: what `ROUNDED` tensors are rounded to, None to keep their own.
        work: the workspace that the export is written in: it knows which files an earlier run finished. A
            format that does not use it writes everything again.
    """

    folder: ModelFolder
    lock: Lock
    trust_remote_code: bool
    rounded_to: torch.dtype | None = None
    work: Workspace | None = None

    @cached_property
    def sites(self) -> frozenset[str]:
        """The names of the sparse weights."""
        return frozenset(entry.name for entry in self.lock.sites)

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is exported in."""
        own = self.folder.info(name)[1].dtype
        return own if self.rounded_to is None or own not in ROUNDED else dtype_name(self.rounded_to)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is exported: the model's, rounded once where that was asked for, no zero gained."""
        return self.as_exported(name, self.folder.read(name))

    def as_exported(self, name: str, value: Tensor) -> Tensor:
        """What `stored` makes of the model's tensor, however that was read."""
        if self.rounded_to is None or self.dtype(name) == self.folder.info(name)[1].dtype:
            return value
        return rounded(name, value, self.rounded_to, keep=name in self.sites)

    def canonical(self, entry: LockEntry) -> Tensor:
        stored = self.stored(entry.name)
        return stored.transpose(-1, -2) if entry.transposed else stored

    def kept_from_zero(self) -> int:
        """How many entries of sites would round to zero, and are kept as the smallest normal number."""
        if self.rounded_to is None:
            return 0
        blocks = (
            block
            for entry in self.lock.sites
            if self.dtype(entry.name) != self.folder.info(entry.name)[1].dtype
            for block in self.folder.info(entry.name)[0].row_blocks(entry.name)
        )
        return sum(int(((b != 0) & (b.to(self.rounded_to) == 0)).sum()) for b in blocks)

    def copy_small_files(self, target: Path) -> None:
        """Copy configuration, tokenizer and every other file without weights; config.json gets the dtype rounded to."""
        for name in self.folder.other_files():
            if name.as_posix() not in (LOCK_NAME, MANIFEST):  # those of another step
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.folder.path / name, target / name)
        if self.rounded_to is not None:
            _say_dtype(target / "config.json", str(self.rounded_to).removeprefix("torch."))

    def record(self, entry: LockEntry, layout: str, reason: str | None = None, **extra: Any) -> TensorRecord:
        return TensorRecord(
            name=entry.name,
            shape=list(entry.shape),
            dtype=self.dtype(entry.name),
            layout=layout,
            reason=reason,
            transposed=entry.transposed,
            **extra,
        )

    def finish(
        self, folder: Path, format: str, lock: Lock, records: list[TensorRecord], **fields: Any
    ) -> None:
        """Write lock and manifest beside everything else."""
        (folder / LOCK_NAME).write_text(lock.dumps())
        fields = {"requirements": {}, "sizes": {}} | fields
        write_manifest(
            folder, spp_fx_version=VERSION, format=format, pattern=lock.pattern, tensors=records, **fields
        )


def rounded(name: str, value: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """A floating tensor rounded once to another type.

    Args:
        keep: what would become zero becomes the smallest normal number of its sign, for the mask's sake.

    Raises:
        MaskError: a finite value becomes infinite; `name` says whose.
    """
    result = torch.empty(value.shape, dtype=dtype)
    chunks = zip(result.view(-1).split(_CHUNK), value.reshape(-1).split(_CHUNK), strict=True)
    for part, chunk in chunks:
        part.copy_(_rounded(name, chunk, dtype, keep))
    return result


def _rounded(name: str, value: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    # torch goes to half precision by way of float32, which is exact for all but float64.
    double = value.dtype is torch.float64 and dtype.itemsize == 2
    result = round_once(value, dtype) if double else value.to(dtype)
    if bool((result.isinf() & ~value.isinf()).any()):
        raise MaskError(f"{name}: a value is too large for {dtype}; choose another --dtype")
    if not keep:
        return result
    smallest = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    return torch.where((value != 0) & (result == 0), torch.copysign(smallest, result), result)


def _say_dtype(path: Path, dtype: str) -> None:
    """Put the dtype of rounded weights into the copied config.json."""
    config = json.loads(path.read_bytes())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header is written, and whose tensors are filled in any order, by any thread.

    Attributes:
        file: of its final size.
        spans: the first byte of each tensor, and the one after its last.
    """

    file: FileIO
    spans: Mapping[str, tuple[int, int]]

    def nbytes(self, name: str) -> int:
        start, stop = self.spans[name]
        return stop - start

    def write(self, name: str, data: Tensor, at: int = 0) -> None:
        """Write elements of any dtype into a tensor, from its byte `at` on."""
        if data.numel():
            self.write_bytes(name, data.contiguous().reshape(-1).view(torch.uint8).numpy(), at)

    def write_bytes(self, name: str, data: NDArray[np.uint8], at: int = 0) -> None:
        start, stop = self.spans[name]
        view, done = data.data, 0
        if start + at + len(view) > stop:
            raise ValueError(f"{self.file.name}: {name}: {len(view)} bytes from {at} on are too many")
        while done < len(view):
            done += os.pwrite(self.file.fileno(), view[done:], start + at + done)


@contextmanager
def new_tensor_file(
    path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> Generator[TensorFile, None, None]:
    """A new file that is fsynced at the end, removed when anything fails; its caller fills every tensor."""
    ordered = layout(specs, path)
    header = header_bytes(ordered, metadata, path)
    spans: dict[str, tuple[int, int]] = {}
    stop = len(header)
    for name, dtype, shape in ordered:
        start, stop = stop, stop + stored_nbytes(dtype, shape, name)
        spans[name] = start, stop
    with new_file(path) as out:
        write_all(out, memoryview(header))
        os.ftruncate(out.fileno(), stop)
        yield TensorFile(out, spans)


Say = Callable[[str], None]


@dataclass(frozen=True)
class Decoded:
    """The model's tensors as an export gives them back, one by one.

    Attributes:
        shapes: as the model's files store them, by the names of those files.
        read: a tensor by name, as the model stores it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def weights(self, manifest: Manifest, file: str) -> Weights:
        """What `verify` reads, for a format without a faster way than decoding: each site is decoded and scanned.

        Args:
            file: the name of the file that holds the weights, for messages.
        """

        def scan(name: str, transposed: bool) -> Scan:
            return scan_tensor(self.read(name), transposed=transposed)

        sites = Sites({record.name: record.transposed for record in manifest.tensors})
        return Weights(frozenset(self.shapes), scan, lambda _: file, lambda: sites)


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: as `--format` and the manifest spell it.
        write: writes all files, lock and manifest of an export into an empty folder and compares what it
            can; returns what it checked. Called with source, folder, settings, tick, say.
        read: the weights of such a folder, from its files.
        options: the fields of `ExportSettings` that it takes.
        decode: gives the model's tensors back; None where the export is a program of its own.
        mends_config: takes a model of plain weights whose config.json has a sparsity_config, and writes it
            without.
        restore: writes the files of the model's folder that hold weights, byte for byte as they were; None
            where the export does not know them. Called with export, manifest, target, tick.
    """

    name: str
    write: Callable[[Source, Path, ExportSettings, Tick, Say], dict[str, Any]]
    read: Callable[[Path, Manifest], Weights]
    options: frozenset[str] = frozenset()
    decode: Callable[[Path, Manifest], Decoded] | None = None
    restore: Callable[[Path, Manifest, Path, Tick], None] | None = None
    mends_config: bool = False


FORMATS = Registry[Format]("export format", "spp_fx.formats", package="spp_fx.exporters")


def register(format: Format) -> Format:
    """Make a format known; packages of others use the entry point group `spp_fx.formats`."""
    FORMATS[format.name] = format
    return format


def find_format(name: str) -> Format:
    """A format by name; UsageError lists what is known."""
    return FORMATS.find(name)
