"""The tables and keys that spp-fx.toml may have; loaded where there is one."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from spp_fx.checkpoint.header import regular_file_size
from spp_fx.errors import UsageError
from spp_fx.sparsity import parse_pattern
from spp_fx.workflows.demands import Coverage

_MAX_BYTES = 1 << 20


def read_policy(path: Path) -> "VerifyTable":
    """The `[verify]` of a policy file.

    Raises:
        UsageError: there is no such file, it is no regular file, too large or not TOML, or a key is
            unknown or of a wrong kind; names the file and the key.
    """
    if regular_file_size(path) > _MAX_BYTES:  # before it is opened: a pipe would never end
        raise UsageError(f"{path}: is larger than {_MAX_BYTES} bytes, which no policy is")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: the policy cannot be read: {error.strerror}") from error
    try:
        content = tomllib.loads(data.decode("utf-8-sig"))  # some editors of Windows put a BOM first
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise UsageError(f"{path}: is not TOML: {error}") from error
    try:
        return _File.model_validate(content).verify
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_fault(error)}") from error


def _is_pattern(text: str) -> str:
    try:
        parse_pattern(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text


_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Pattern = Annotated[_Text, AfterValidator(_is_pattern)]
_Names = list[_Text]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class RuleTable(_Strict):
    sites: Annotated[_Names, Field(min_length=1)]
    pattern: _Pattern


class _Asked(_Strict):
    """What an artifact is held to; a key that is left out is None, so that a default can stand for it."""

    pattern: _Pattern | None = None
    coverage: Coverage | None = None
    require: _Names | None = None
    allow_dense: _Names | None = None
    rule: list[RuleTable] | None = None


class ArtifactTable(_Asked):
    path: _Text
    lock: _Text | None = None
    against: _Text | None = None


class VerifyTable(_Asked):
    artifact: list[ArtifactTable] = []

    @model_validator(mode="after")
    def _once(self) -> "VerifyTable":
        paths = [os.path.normpath(artifact.path) for artifact in self.artifact]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"two artifacts have the path {twice[0]!r}")
        return self


class _File(_Strict):
    verify: VerifyTable = VerifyTable()


def _first_fault(error: ValidationError) -> str:
    """The key and what is wrong with it; for an unknown key, those that are known."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        text = f"unknown key; known: {', '.join(known)}"
    return f"{where.lstrip('.') or 'the file'}: {text}"[:400]


_TABLES: Mapping[tuple[str, ...], type[_Strict]] = {
    (): _File,
    ("verify",): VerifyTable,
    ("verify", "rule"): RuleTable,
    ("verify", "artifact"): ArtifactTable,
    ("verify", "artifact", "rule"): RuleTable,
}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    table = tuple(part for part in location if isinstance(part, str))
    return list(_TABLES[table].model_fields)
