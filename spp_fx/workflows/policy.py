"""spp-fx.toml: what the artifacts of a repository are held to, whoever runs verify.

[verify]                            # what every artifact is held to
pattern = "2:4"

[[verify.artifact]]                 # one artifact; its keys replace those above
path = "models/my-model"            # or a glob; all paths are relative to this file
coverage = "all"
allow_dense = ["lm_head"]

[[verify.artifact.rule]]            # some of its sites hold another pattern
sites = ["down_proj"]
pattern = "4:8"
"""

import glob
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from spp_fx.ir.names import is_glob
from spp_fx.sparsity import parse_pattern
from spp_fx.workflows.demands import Coverage, Demands
from spp_fx.workflows.request import Check

POLICY_NAME = "spp-fx.toml"
_MAX_BYTES = 1 << 20


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


class _Rule(_Strict):
    sites: Annotated[_Names, Field(min_length=1)]
    pattern: _Pattern


class _Asked(_Strict):
    """What an artifact is held to; a key that is left out is None, so that a default can stand for it."""

    pattern: _Pattern | None = None
    coverage: Coverage | None = None
    require: _Names | None = None
    allow_dense: _Names | None = None
    rule: list[_Rule] | None = None


class _Artifact(_Asked):
    path: _Text
    lock: _Text | None = None
    against: _Text | None = None


class _Verify(_Asked):
    artifact: list[_Artifact] = []

    @model_validator(mode="after")
    def _once(self) -> "_Verify":
        paths = [os.path.normpath(artifact.path) for artifact in self.artifact]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"two artifacts have the path {twice[0]!r}")
        return self


class _File(_Strict):
    verify: _Verify = _Verify()


@dataclass(frozen=True)
class Overrides:
    """Options of a command line: each that is given replaces the policy's key of that name.

    `pattern` is asked of every site, so that it replaces the policy's rules as well.
    """

    pattern: str | None = None
    lock: Path | None = None
    against: Path | None = None
    coverage: Coverage | None = None
    require: tuple[str, ...] = ()
    allow_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """A policy file that was read; without one, nothing is asked and no artifact is named."""

    path: Path | None = None
    _verify: _Verify = field(default=_Verify(), repr=False)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file.

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
            return cls(path, _File.model_validate(content).verify)
        except ValidationError as error:
            raise UsageError(f"{path}: {_first_fault(error)}") from error

    @classmethod
    def find(cls, explicit: Path | None = None, folder: Path = Path()) -> "Policy":
        """The policy that was asked for, else spp-fx.toml of a folder, else an empty one.

        Raises:
            UsageError: as `load`; also for a link that leads nowhere or a folder of that name, which is no
                absent policy.
        """
        if explicit is not None:
            return cls.load(explicit)
        path = folder / POLICY_NAME
        return cls.load(path) if os.path.lexists(path) else cls()

    def check(self, artifact: Path, given: Overrides = Overrides()) -> Check:
        """What one artifact is held to: by its own entry, if it has one, and by what all are.

        An entry that spells the path out goes before any glob; of several globs the first counts.

        Raises:
            UsageError: two entries spell out the same artifact.
        """
        real = artifact.resolve()
        if (own := self._spelt_out().get(real)) is not None:
            return self._check(artifact, own, given)
        for entry in self._verify.artifact:
            if is_glob(entry.path) and any(path.resolve() == real for path in self._expand(entry)):
                return self._check(artifact, entry, given)
        return self._check(artifact, None, given)

    def checks(self, given: Overrides = Overrides()) -> list[Check]:
        """Every artifact of the policy, in its order; entries are preferred as in `check`.

        Raises:
            UsageError: it names none, one that is not there, or spells one out twice; a lock or an artifact
                to compare with was given for more than one.
        """
        if not self._verify.artifact:
            raise UsageError(
                f"{self.path}: names no artifact; add [[verify.artifact]] with a path, or give ARTIFACT "
                "('.' is this folder)"
            )
        spelt_out = self._spelt_out()
        found: dict[Path, Check] = {}
        for number, entry in enumerate(self._verify.artifact):
            paths = self._expand(entry)
            if not paths or not all(os.path.lexists(path) for path in paths):
                what = "matches nothing" if is_glob(entry.path) else "does not exist"
                raise UsageError(f"{self.path}: verify.artifact[{number}].path: {entry.path!r} {what}")
            for path in paths:
                real = path.resolve()
                found.setdefault(real, self._check(path, spelt_out.get(real, entry), given))
        if len(found) > 1 and (given.lock or given.against):
            option = "--lock" if given.lock else "--against"
            raise UsageError(
                f"{option} speaks of one artifact, {self.path} names {len(found)}; give ARTIFACT"
            )
        return list(found.values())

    def _spelt_out(self) -> dict[Path, _Artifact]:
        """The entries without globs by their files, links followed; UsageError for two of the same file."""
        found: dict[Path, _Artifact] = {}
        for entry in self._verify.artifact:
            if is_glob(entry.path):
                continue
            other = found.setdefault((self._root() / entry.path).resolve(), entry)
            if other is not entry:
                raise UsageError(
                    f"{self.path}: {other.path!r} and {entry.path!r} are the same artifact; name it once"
                )
        return found

    def _expand(self, entry: _Artifact) -> Sequence[Path]:
        root = self._root()
        if not is_glob(entry.path):
            return [root / entry.path]
        names = glob.glob(entry.path, root_dir=root, recursive=True)
        return [root / name for name in sorted(names)]

    def _check(self, path: Path, entry: _Artifact | None, given: Overrides) -> Check:
        def asked(key: str) -> Any:
            own = getattr(entry, key) if entry else None
            return own if own is not None else getattr(self._verify, key)

        everywhere = given.pattern is not None
        rules: list[_Rule] = [] if everywhere else asked("rule") or []
        demands = Demands.of(
            given.pattern if everywhere else asked("pattern"),
            rules=[(rule.sites, rule.pattern) for rule in rules],
            require=given.require or asked("require") or (),
            allow_dense=given.allow_dense or asked("allow_dense") or (),
            coverage=given.coverage or asked("coverage") or "lock",
        )
        lock = self._root() / entry.lock if entry and entry.lock else None
        against = self._root() / entry.against if entry and entry.against else None
        return Check(path, demands, given.lock or lock, given.against or against)

    def _root(self) -> Path:
        return self.path.parent if self.path else Path()


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
    ("verify",): _Verify,
    ("verify", "rule"): _Rule,
    ("verify", "artifact"): _Artifact,
    ("verify", "artifact", "rule"): _Rule,
}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    table = tuple(part for part in location if isinstance(part, str))
    return list(_TABLES[table].model_fields)
