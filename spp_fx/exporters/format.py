"""Export formats: the contract, the registry, and the model that an export is written from."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_fx.adapters.fold import round_once
from spp_fx.errors import MaskError
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord, write_manifest
from spp_fx.options import check_options, check_values
from spp_fx.parallel import Tick
from spp_fx.registry import Registry, naming
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry
from spp_fx.sparsity.scan import Scan, scan_stored, scan_tensor
from spp_fx.sparsity.weights import Sites, Weights
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard, dtype_name, stored_nbytes
from spp_fx.storage.workspace import Say, Workspace
from spp_fx.storage.writer import TensorSpec, copy_file, header_bytes, layout, new_file, write_all, write_at
from spp_fx.version import VERSION

RoundTo: TypeAlias = Literal["float32", "float16", "bfloat16"]
ROUND_TO: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What `--dtype` rounds to."""
ROUNDED = ("F64", "F32", "F16", "BF16")
"""The types that `--dtype` rounds; integers and the types of quantized weights stay byte for byte."""
_CHUNK = 1 << 20
"""Elements rounded at a time, so that temporaries stay in cache."""


@dataclass(frozen=True)
class Source:
    """A model folder to export, and the masks that the export must have.

    Attributes:
        folder: the model's folder.
        lock: of its sparse weights.
        trust_remote_code: whether the folder's own model code may run.
        rounded_to: what tensors of the types in `ROUNDED` are rounded to; None keeps their own type.
        work: the workspace that the export is written in. It knows which files an earlier run finished.
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
        """A tensor as it is exported: rounded once where `rounded_to` says so, and no zero gained."""
        return self.as_exported(name, self.folder.read(name))

    def as_exported(self, name: str, value: Tensor) -> Tensor:
        """`stored` of a tensor, or of some rows of it, that was read already."""
        if self.rounded_to is None or self.dtype(name) == self.folder.info(name)[1].dtype:
            return value
        return rounded(name, value, self.rounded_to, keep=name in self.sites)

    def canonical(self, entry: LockEntry) -> Tensor:
        """A sparse weight as it is exported, with dimensions (..., out, in)."""
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
        """Copy configuration, tokenizer and every other file without weights; config.json gets the new dtype."""
        for name in self.folder.other_files():
            if name.as_posix() not in (LOCK_NAME, MANIFEST):  # those of another step
                copy_file(self.folder.path / name, target / name)
        if self.rounded_to is not None:
            path = target / "config.json"
            config = json.loads(path.read_bytes())
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = str(self.rounded_to).removeprefix("torch.")
            path.write_text(json.dumps(config, indent=2) + "\n")

    def record(self, entry: LockEntry, layout: str, reason: str | None = None, **extra: Any) -> TensorRecord:
        """The manifest's record of a site."""
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
        self,
        folder: Path,
        format: str,
        records: list[TensorRecord],
        *,
        requirements: Mapping[str, int | str] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Write the lock, unless it is there already, and then the manifest."""
        if not (folder / LOCK_NAME).exists():
            (folder / LOCK_NAME).write_text(self.lock.dumps())
        write_manifest(
            folder,
            spp_fx_version=VERSION,
            format=format,
            pattern=self.lock.pattern,
            requirements=dict(requirements or {}),
            tensors=records,
            sizes=dict(sizes or {}),
        )


def rounded(name: str, value: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """A floating tensor rounded once to another type.

    Args:
        name: of the tensor, for errors.
        keep: an entry that would become zero becomes the smallest normal number of its sign, which keeps the mask.

    Raises:
        MaskError: a finite value becomes infinite.
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
        if start + at + data.size > stop:
            raise ValueError(f"{self.file.name}: {name}: {data.size} bytes from {at} on are too many")
        write_at(self.file.fileno(), start + at, data.data)


@contextmanager
def new_tensor_file(
    path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> Generator[TensorFile, None, None]:
    """A new file, fsynced at the end and removed when anything fails; the caller fills every tensor."""
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


@dataclass(frozen=True)
class Decoded:
    """The model's tensors, which an export gives back one by one.

    Attributes:
        shapes: of every tensor, as the model stores it.
        read: a tensor by name, as the model stores it.
        file: the name of the file that a tensor is read from, for messages.
        stored: the file that holds a tensor under its own name as the model does, so that `verify` scans it
            there; None where it has to be decoded.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    file: Callable[[str], str]
    stored: Callable[[str], Shard | None] = lambda name: None

    def weights(self, manifest: Manifest) -> Weights:
        """The weights that `verify` scans."""

        def scan(name: str, transposed: bool) -> Scan:
            shard = self.stored(name)
            if shard is not None:
                return scan_stored(shard, name, transposed=transposed)
            tensor = self.read(name)
            if transposed and tensor.ndim > 1 and tensor.mT.is_contiguous():
                return scan_tensor(tensor.mT)  # a decoder of rows (out, in) made it: no copy
            return scan_tensor(tensor, transposed=transposed)

        sites = Sites({record.name: record.transposed for record in manifest.tensors})
        return Weights(frozenset(self.shapes), scan, self.file, lambda: sites)


@dataclass(frozen=True)
class Format(ABC):
    """An export format: a frozen dataclass whose fields are its options, made by `option`.

    An option `dtype: RoundTo | None` is special: the floating tensors of `Source` are rounded to it.

    Attributes:
        name: under which it was registered; `--format` and the manifest have it.
        plain: it writes plain weights and a config.json without sparsity_config, so that it takes a model of plain
            weights whose config.json has one.
        program: its exports are programs of their own, from which no model is read back.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    program: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self, self.name)

    @abstractmethod
    def write(self, source: Source, folder: Path, tick: Tick, say: Say) -> dict[str, Any]:
        """Fill an empty folder, the manifest last, and compare what was written with the model.

        Returns:
            What was compared, and how much of it.
        """

    @classmethod
    def decode(cls, folder: Path, manifest: Manifest) -> Decoded:
        """The model's tensors from the files of an export.

        Raises:
            FormatError: a file is damaged; names it and the tensor. Nothing in the folder is trusted.
        """
        raise NotImplementedError(f"{cls.__name__} must define decode, or read and program = True")

    @classmethod
    def restore(cls, folder: Path, manifest: Manifest, target: Path, tick: Tick) -> bool:
        """Write the model's weight files byte for byte, if the export knows them; returns whether it did."""
        return False

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Weights:
        """The weights of an export, which `verify` scans."""
        return cls.decode(folder, manifest).weights(manifest)


FORMATS = Registry[type[Format]]("export format", "spp_fx.formats", "spp_fx.exporters")
register = naming(FORMATS)


def make_format(name: str, **options: Any) -> Format:
    """A format by name with its options; UsageError for an unknown name, or an option that it does not have."""
    check_options(FORMATS, name, options)
    return FORMATS.find(name)(**options)


def decoding_formats() -> str:
    """The formats from which a model is read back, in words."""
    return ", ".join(sorted(name for name, each in FORMATS.items() if not each.program))
