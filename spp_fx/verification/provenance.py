"""`sparsity.provenance.json`: which steps made a folder, and what each of them wrote.

The lock states what must hold; this file records what was done: oldest first, one record a step. A step copies the
history of its input and adds itself. Paths and times are not recorded, so the same input gives the same bytes. When
a mask no longer holds, `blame` distinguishes a file that was changed later from one that was written that way.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator

from spp_fx.errors import FormatError, SppFxError
from spp_fx.exporters.manifest import TENSOR_FILES, sha256
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.storage.folder import within
from spp_fx.storage.output import atomic_file
from spp_fx.storage.strict_json import StrictModel, first_fault, parse_model, read_bytes
from spp_fx.version import VERSION

PROVENANCE = "sparsity.provenance.json"
FORMAT_VERSION = 1

StepName = Literal["prune", "reconstruct", "lock", "inject", "merge", "export", "unpack"]
Setting = str | int | float | bool | None | list[str]

_TRAINED = "adapter_model.safetensors"  # every training run rewrites it, so that no digest of it would last
_MAX_BYTES = 16 << 20
_MAX_STEPS = 1000

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
_Version = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+!-]{1,64}$")]


class FileRecord(StrictModel):
    """A weight file as a step left it; `sha256` is None where the step did not read it back."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: _Digest | None


class Step(StrictModel):
    """One step of a folder's history.

    Attributes:
        inputs: what was read, by its role (`model`, `base`, `adapter`): `ModelFolder.fingerprint` or another
            256-bit digest.
        settings: the options that the result depends on.
        lock: BLAKE2b-256 of the bytes of the lock beside the weights, None where there was none.
        files: the weight files of the folder, by their path in it; none for an adapter, which training changes.
    """

    step: StepName
    tool_version: _Version
    inputs: dict[_Name, _Digest]
    settings: dict[_Name, Setting]
    lock: _Digest | None
    files: dict[_Name, FileRecord]

    def __str__(self) -> str:
        return f"{self.step} (spp-fx {self.tool_version})"

    @property
    def verb(self) -> str:
        """What the step did with weight files: lock writes none."""
        return "saw" if self.step == "lock" else "wrote"


class Provenance(StrictModel):
    """The steps that made a folder, oldest first."""

    format_version: int
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=_MAX_STEPS)]

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version} is unknown, this release reads {FORMAT_VERSION}")
        return version

    @classmethod
    def of(cls, steps: tuple[Step, ...]) -> Self:
        return cls(format_version=FORMAT_VERSION, steps=steps)

    def dumps(self) -> str:
        """The file's text: ASCII JSON, keys sorted, the same bytes for the same steps."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def load(folder: Path) -> Provenance | None:
    """The history of a folder, None if it has none.

    Raises:
        FormatError: the file is damaged; names it and the fault.
        SppFxError: it cannot be read.
    """
    if not os.path.lexists(folder / PROVENANCE):  # a dangling link is not the same as no file
        return None
    path = within(folder, PROVENANCE)
    try:
        return parse_model(Provenance, read_bytes(path, _MAX_BYTES), str(path))
    except FormatError as error:
        raise FormatError(f"{error}; remove it to start a new history with the next step") from error


def record(
    folder_in: Path | None,
    folder_out: Path,
    step: StepName,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    digests: Mapping[str, str],
    lock: Path | None = None,
) -> None:
    """Write the history of `folder_in`, with this step added, into `folder_out`.

    Call it last: it records the digest of the lock and the sizes of the weight files.

    Args:
        folder_in: the input whose history goes on; None where there is none. It may be `folder_out` itself, whose
            file is then replaced as a whole.
        inputs: fingerprints of what was read, by role.
        settings: options that the result depends on; plain values, no paths.
        digests: SHA-256 of weight files by their path in `folder_out`, as read back; other weight files are
            recorded without one. Entries of other files are ignored.
        lock: the lock where it is not in `folder_out` yet.

    Raises:
        FormatError: the history of `folder_in` is damaged (call `load` before long work to know it early); a name,
            digest or setting that the file cannot hold.
    """
    past = load(folder_in) if folder_in is not None else None
    files = sorted(
        path.relative_to(folder_out).as_posix()
        for path in folder_out.rglob("*")
        if path.name.endswith(TENSOR_FILES) and path.name != _TRAINED and path.is_file()
    )
    try:
        last = Step(
            step=step,
            tool_version=VERSION,
            inputs=dict(inputs),
            settings=dict(settings),
            lock=_lock_digest(lock or folder_out / LOCK_NAME),
            files={
                name: FileRecord(bytes=(folder_out / name).stat().st_size, sha256=digests.get(name))
                for name in files
            },
        )
        history = Provenance.of((*(past.steps if past else ()), last))
    except ValidationError as error:
        raise FormatError(f"{folder_out / PROVENANCE}: {step}: {first_fault(error)}") from error
    if folder_in != folder_out:  # a folder that is still being written
        (folder_out / PROVENANCE).write_text(history.dumps(), encoding="ascii")
        return
    with atomic_file(folder_out / PROVENANCE, force=True) as temporary:
        temporary.write_text(history.dumps(), encoding="ascii")


def blame(folder: Path, file: str) -> str | None:
    """Which step a failing weight file comes from, in a sentence for an error message.

    Reads the whole file: call it once a file, not once a site.

    Args:
        folder: the folder that was verified.
        file: path in it of the file in which a mask does not hold.

    Returns:
        Whether the file is as the last step wrote it, and whether the lock beside it is still that step's;
        None where the folder has no history or no such file.
    """
    try:
        history = load(folder)
        if history is None:
            return None
        path = within(folder, file)
        if not path.is_file():
            return None
        return _about_file(history, path, file) + _about_lock(history.steps[-1], folder / LOCK_NAME)
    except SppFxError as error:  # the verdict stands without its explanation
        return f"the step at fault is unknown: {error}"
    except OSError as error:
        return f"the step at fault is unknown: {error.filename}: {error.strerror}"


def _about_file(history: Provenance, path: Path, file: str) -> str:
    last = history.steps[-1]
    then = last.files.get(file)
    if then is None:
        return f"{file} is not one of the files that {last} {last.verb}: it was added or renamed afterwards"
    changed = f"{file} is not what {last} {last.verb}: it changed afterwards"
    size = path.stat().st_size
    if size != then.bytes:
        return f"{changed} ({size} bytes now, {then.bytes} then)"
    if then.sha256 is None:
        return f"{last} recorded no digest of {file}, so it is unknown whether the file changed afterwards"
    if sha256(path) != then.sha256:
        return changed
    origin = last
    for step in reversed(history.steps[:-1]):
        before = step.files.get(file)
        if before is None or before.sha256 is None:
            continue
        if before.sha256 != then.sha256:
            if origin.step == "lock":
                return f"{file} is not what {step} wrote: it changed before {origin} was run"
            break
        origin = step
    return (
        f"{file} is byte for byte what {origin} {origin.verb}, "
        "so its zeros were where they are now when that step ended"
    )


def _about_lock(last: Step, lock: Path) -> str:
    now = _lock_digest(lock)
    if now == last.lock:
        return ""
    fate = "removed" if now is None else "added" if last.lock is None else "replaced"
    return f"; {LOCK_NAME} was {fate} after {last.step}"


def file_blake2b(path: Path) -> str:
    """BLAKE2b-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _lock_digest(lock: Path) -> str | None:
    return file_blake2b(lock) if lock.is_file() else None
