"""export.json: the contents of an export folder, what they depend on, and the digest of every file."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.legacy import compressed_layers, sparsity_configs
from spp_fx.sparsity.lock import LOCK_NAME, load_lock
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.safetensors import stored_nbytes
from spp_fx.storage.strict_json import read_object

MANIFEST = "export.json"
SCHEMA_VERSION = 1
COMPACT = "sparse"
"""The folder of compact weight files (sparse-bitmask) in an export."""
TENSOR_FILES = (".safetensors", ".onnx", ".onnx.data")
"""Suffixes of files that hold weights: such a file is never read without a digest."""

Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Where an ONNX graph holds a site that has another name there, or is part of a stack.

    Attributes:
        initializer: name in the graph.
        expert: index in the stack; None where the initializer is a matrix.
        start, stop: rows of the matrix; all of them where stop is 0.
        swapped: the graph holds it with its last two dimensions swapped.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    initializer: str
    expert: Count | None = None
    start: Count = 0
    stop: Count = 0
    swapped: bool = False


class TensorRecord(BaseModel):
    """One site in an export.

    Attributes:
        name: the checkpoint's name of the weight.
        shape: canonical, (out, in) or (experts, out, in).
        dtype: of the values, in safetensors' words ('BF16').
        layout: of the format; `dense` where it could not be stored sparse.
        reason: why it is not in the format's own layout, None where it is.
        transposed: the model stores it (in, out).
        negative_zeros: how many -0.0 had no slot and were written as +0.0.
        details: sizes and the like.
        part: where it is in an ONNX graph.
    """

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    name: str
    shape: Annotated[list[Count], Field(min_length=2, max_length=3)]
    dtype: str
    layout: str
    reason: str | None = None
    transposed: bool = False
    negative_zeros: Count = 0
    details: dict[str, int | str] = {}
    part: Part | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight, dense and of this dtype."""
        return stored_nbytes(self.dtype, tuple(self.shape), self.name)


class Manifest(BaseModel):
    """The manifest of an export folder.

    Attributes:
        requirements: what the export needs or depends on; each format has its own keys.
        sizes: see `site_sizes`.
        files: SHA-256 of each other file.
    """

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    schema_version: Literal[1]
    spp_fx_version: str
    format: str
    pattern: str | None
    requirements: dict[str, int | str]
    tensors: list[TensorRecord]
    sizes: dict[str, int]
    files: dict[str, str]


def site_sizes(dense_bytes: int, sites_bytes: int, files: Iterable[Path]) -> dict[str, int]:
    """Bytes of all sites, dense in the dtype of the export and as stored, and of the files with weights."""
    return {
        "dense_bytes": dense_bytes,
        "sites_bytes": sites_bytes,
        "file_bytes": sum(path.stat().st_size for path in files),
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits; other threads run meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """Write export.json with the digests of all other files of `folder`."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, files={name: sha256(folder / name) for name in files}, **fields
    )
    _write(folder, manifest)
    return manifest


def add_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Write export.json again with the digest of a file that was written or replaced after it."""
    files = dict(sorted((manifest.files | {name: sha256(folder / name)}).items()))
    _write(folder, manifest.model_copy(update={"files": files}))


def _write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path, *, check_files: bool = True) -> Manifest:
    """Read export.json and check its sites against the lock beside it.

    Args:
        folder: the export.
        check_files: every file that it names must exist and have its digest, and it must name the lock and
            every file that holds weights.

    Raises:
        FormatError: names the file and the fault.
    """
    path = within(folder, MANIFEST)
    try:
        manifest = Manifest.model_validate(read_object(path), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:200] for part in fault["loc"])
        raise FormatError(f"{path}: {where}: {fault['msg']}; export the model again") from error
    # The lock first: it is small, and what it contradicts need not be read.
    if os.path.lexists(folder / LOCK_NAME):
        _check_sites(within(folder, LOCK_NAME), path, manifest.pattern, manifest.tensors)
    if check_files:
        _check_files(folder, path, manifest.files)
    return manifest


def _check_files(folder: Path, path: Path, files: dict[str, str]) -> None:
    for name in files:
        if not within(folder, name).is_file():
            raise FormatError(
                f"{folder / name}: is missing, or not a file; {MANIFEST} names it. Get the export again"
            )
    # A file of weights without a digest would be trusted.
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if (name == LOCK_NAME or name.endswith(TENSOR_FILES)) and name not in files and not file.is_dir():
            raise FormatError(f"{path}: files: {name} has no digest; export again")
    for name, digest in files.items():
        if sha256(folder / name) != digest:
            raise FormatError(f"{folder / name}: has changed since it was exported (SHA-256 differs)")


def _check_sites(lock_path: Path, path: Path, pattern: str | None, tensors: list[TensorRecord]) -> None:
    lock = load_lock(lock_path)
    if pattern != lock.pattern:
        raise FormatError(f"{path}: pattern: {pattern!r}, {LOCK_NAME} has {lock.pattern!r}")
    entries = lock.by_name()
    for index, record in enumerate(tensors):
        where = f"{path}: tensors.{index}"
        entry = entries.pop(record.name, None)
        if entry is None:
            raise FormatError(f"{where}.name: {record.name} is listed twice or is not in {LOCK_NAME}")
        if tuple(record.shape) != entry.shape:
            raise FormatError(f"{where}.shape: {record.shape}, {LOCK_NAME} has {list(entry.shape)}")
        if record.transposed != entry.transposed:
            raise FormatError(f"{where}.transposed: {record.transposed}, {LOCK_NAME} has {entry.transposed}")
    if entries:
        raise FormatError(f"{path}: tensors: {min(entries)} of {LOCK_NAME} is missing")


def open_model(path: Path, *, weights: bool = True, any_config: bool = False) -> ModelFolder:
    """Open a model folder that transformers loads as it is.

    Args:
        weights: whether it must hold weights.
        any_config: also take a folder of plain weights whose config.json has a sparsity_config.

    Raises:
        UsageError: an export in a form that transformers cannot load.
        FormatError: a file is damaged, or the weights are compressed: transformers would load random numbers.
    """
    if (path / MANIFEST).is_file() and (form := read_manifest(path).format) != "safetensors":
        raise UsageError(f"{path}: is an export ({form}); give the model folder that it was made from")
    folder = ModelFolder.open(path, weights=weights)
    if layers := compressed_layers(folder):
        raise FormatError(
            f"{path}: its weights are compressed (first: {layers[0]}.weight); servers and transformers load "
            f"such a model with random weights. Write the plain folder with 'spp-fx unpack {path}'"
        )
    if sparsity_configs(folder.config) and not any_config:
        raise FormatError(
            f"{path}: config.json has a sparsity_config, which servers refuse or misread; "
            f"write the plain folder with 'spp-fx unpack {path}'"
        )
    return folder
