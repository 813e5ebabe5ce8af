"""export.json: what an export folder holds, tied to what, with the digest of every file."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spp_fx.errors import FormatError

MANIFEST = "export.json"
SCHEMA_VERSION = 1
CHUNK = 1 << 22


class TensorRecord(BaseModel):
    """One site in an export.

    Attributes:
        name: the checkpoint's name of the weight.
        shape: canonical, (out, in).
        dtype: of the values, in safetensors' words ('BF16').
        layout: how it is stored here; `dense` where it could not be stored sparse.
        reason: why it is dense, None where it is not.
        transposed: the base stores it (in, out).
        negative_zeros: zeros of negative sign that had no slot and were written as +0.
        details: what the layout needs to be read (index type, sizes, ...).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    shape: list[int]
    dtype: str
    layout: str
    reason: str | None = None
    transposed: bool = False
    negative_zeros: int = 0
    details: dict[str, int | str] = {}


class Manifest(BaseModel):
    """The manifest of an export folder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1]
    spp_fx_version: str
    format: str
    pattern: str | None
    requirements: dict[str, int | str]
    tensors: list[TensorRecord]
    sizes: dict[str, int]
    files: dict[str, str]


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """Write export.json over all other files of `folder`, with their digests."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, files={name: sha256(folder / name) for name in files}, **fields
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_manifest(folder: Path, *, check_files: bool = True) -> Manifest:
    """Read export.json; with `check_files` every file it names must be there with its digest.

    Raises:
        FormatError: names the file and the fault.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes()), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise FormatError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON: {error}") from error
    for name, digest in manifest.files.items() if check_files else ():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise FormatError(f"{path}: names {name}, which is outside of the export")
        if not file.is_file():
            raise FormatError(f"{file}: is missing; {MANIFEST} names it")
        if sha256(file) != digest:
            raise FormatError(f"{file}: has changed since it was exported (SHA-256 differs)")
    return manifest
