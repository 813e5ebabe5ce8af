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

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from spp_fx.errors import FormatError, SppFxError
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.storage.folder import within
from spp_fx.storage.strict_json import parse_object, regular_file_size, shown
from spp_fx.version import VERSION

PROVENANCE = "sparsity.provenance.json"
FORMAT_VERSION = 1

StepName = Literal["prune", "lock", "inject", "merge", "export", "unpack"]
Setting = str | int | float | bool | None | list[str]

_WEIGHTS = (".safetensors", ".onnx", ".onnx.data")
_TRAINED = "adapter_model.safetensors"  # every training run rewrites it, so that no digest of it would last
_MAX_BYTES = 16 << 20
_MAX_STEPS = 1000

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
_Version = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+!-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Strict):
    """A weight file as a step left it; `sha256` is None where the step did not read it back."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: _Digest | None


class Step(_Strict):
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


class Provenance(_Strict):
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
        FormatError: the file is not what it should be; names it and the fault.
        SppFxError: it cannot be read.
    """
    if not os.path.lexists(folder / PROVENANCE):  # a dangling link is not the same as no file
        return None
    path = within(folder, PROVENANCE)
    if regular_file_size(path) > _MAX_BYTES:
        raise FormatError(f"{path}: is larger than {_MAX_BYTES} bytes; {_MEND}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        parse_object(data, str(path))  # refuses a key that comes twice, which pydantic does not see
        return Provenance.model_validate_json(data)
    except ValidationError as error:
        raise FormatError(f"{path}: {_first_fault(error)}; {_MEND}") from error


def extended(
    past: Provenance | None,
    folder: Path,
    step: StepName,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    digests: Mapping[str, str],
    lock: Path | None = None,
) -> Provenance:
    """A history with one step more: `step`, which left its weight files and its lock in `folder`.

    Args:
        lock: the lock where it is not in `folder` yet.

    Raises:
        FormatError: a name, digest or setting that the file cannot hold.
    """
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.endswith(_WEIGHTS) and path.name != _TRAINED and path.is_file()
    )
    try:
        last = Step(
            step=step,
            tool_version=VERSION,
            inputs=dict(inputs),
            settings=dict(settings),
            lock=_lock_digest(lock or folder / LOCK_NAME),
            files={
                name: FileRecord(bytes=(folder / name).stat().st_size, sha256=digests.get(name))
                for name in files
            },
        )
        return Provenance.of((*(past.steps if past else ()), last))
    except ValidationError as error:
        raise FormatError(f"{folder / PROVENANCE}: {step}: {_first_fault(error)}") from error


def record(
    folder_in: Path | None,
    folder_out: Path,
    step: StepName,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    digests: Mapping[str, str],
) -> None:
    """Write the history of `folder_in`, and this step after it, into a folder that is being written.

    Call it last: it records the digest of the lock and the sizes of the weight files.

    Args:
        folder_in: the input whose history goes on; None where there is none.
        inputs: fingerprints of what was read, by role.
        settings: options that the result depends on; plain values, no paths.
        digests: SHA-256 of weight files by their path in `folder_out`, as read back; others are recorded
            without one. Names of files that hold no weights are left out.

    Raises:
        FormatError: the history of `folder_in` is damaged. Call `load` before long work to know it early.
    """
    past = load(folder_in) if folder_in is not None else None
    history = extended(past, folder_out, step, inputs=inputs, settings=settings, digests=digests)
    (folder_out / PROVENANCE).write_text(history.dumps(), encoding="ascii")


def blame(folder: Path, file: str) -> str | None:
    """Whose fault a failing weight file is, in a sentence for an error message.

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
    except SppFxError as error:  # a verdict is being explained: that it cannot be is part of the answer
        return f"which step is at fault cannot be told: {error}"
    except OSError as error:
        return f"which step is at fault cannot be told: {error.filename}: {error.strerror}"


def _about_file(history: Provenance, path: Path, file: str) -> str:
    last = history.steps[-1]
    verb = "saw" if last.step == "lock" else "wrote"
    then = last.files.get(file)
    if then is None:
        return f"{file} is none of the files that {last} {verb}: it was added or renamed afterwards"
    size = path.stat().st_size
    if size != then.bytes:
        return (
            f"{file} is not what {last} {verb}: it changed afterwards ({size} bytes now, {then.bytes} then)"
        )
    if then.sha256 is None:
        return f"{last} recorded no digest of {file}: whether it changed afterwards cannot be told"
    if file_sha256(path) != then.sha256:
        return f"{file} is not what {last} {verb}: it changed afterwards"
    origin = last
    for step in reversed(history.steps[:-1]):
        before = step.files.get(file)
        if before is None or before.sha256 is None:
            continue
        if before.sha256 != then.sha256:
            if origin.step == "lock":  # lock writes no weights
                return f"{file} is not what {step} wrote: it changed before {origin} was run"
            break
        origin = step
    verb = "saw" if origin.step == "lock" else "wrote"
    return f"{file} is byte for byte what {origin} {verb}, so its zeros were where they are now when that step ended"


def _about_lock(last: Step, lock: Path) -> str:
    now = _lock_digest(lock)
    if now == last.lock:
        return ""
    fate = "removed" if now is None else "added" if last.lock is None else "replaced"
    return f"; {LOCK_NAME} was {fate} after {last.step}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; other threads run meanwhile."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_blake2b(path: Path) -> str:
    """BLAKE2b-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _lock_digest(lock: Path) -> str | None:
    return file_blake2b(lock) if lock.is_file() else None


_MEND = "remove it, then the history starts again with the next step"


def _first_fault(error: ValidationError) -> str:
    """Where and what, in one line, with hostile values cut short."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{shown(where) if where else 'the file'}: {fault['msg'].removeprefix('Value error, ')}"[:400]
