"""What verify asks of artifacts: patterns and coverage from the command line, and spp-fx.toml.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from spp_fx.adapters.adapter_folder import CONFIG as ADAPTER_CONFIG
from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.graph.names import is_glob, is_target
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.sparsity.pattern import Pattern, parse_pattern
from spp_fx.storage.strict_json import regular_file_size
from spp_fx.verify.artifact import open_artifact, refuse_part_of_export

if TYPE_CHECKING:
    pass  # FUSED


Coverage = Literal["lock", "all"]


@dataclass(frozen=True)
class Rule:
    """A pattern of some sites.

    Attributes:
        sites: last words of module names (`down_proj`) or globs over whole names (`*.mlp.*`).
    """

    sites: tuple[str, ...]
    pattern: Pattern


@dataclass(frozen=True)
class Demands:
    """What is asked of sites; names are given as in `Rule.sites`.

    Attributes:
        pattern: asked of every site of which no rule speaks.
        rules: the first one that names a site says its pattern. A name that matches nothing is a failure.
        require: sites that must be sparse. A name that matches nothing is a failure.
        allow_dense: sites of which neither pattern nor sparsity is asked. A lock that names one still holds.
        coverage: `all` asks that every site of the model is in the lock (without a lock: is sparse) and that
            no weight is left unread, but for those of `allow_dense`.
    """

    pattern: Pattern | None = None
    rules: tuple[Rule, ...] = ()
    require: tuple[str, ...] = ()
    allow_dense: tuple[str, ...] = ()
    coverage: Coverage = "lock"

    @classmethod
    def of(
        cls,
        pattern: str | None = None,
        *,
        rules: Iterable[tuple[Iterable[str], str]] = (),
        require: Iterable[str] = (),
        allow_dense: Iterable[str] = (),
        coverage: Coverage = "lock",
    ) -> Self:
        """Demands with patterns as users write them; UsageError for one that is none."""
        return cls(
            parse_pattern(pattern) if pattern is not None else None,
            tuple(Rule(tuple(sites), parse_pattern(text)) for sites, text in rules),
            tuple(require),
            tuple(allow_dense),
            coverage,
        )

    @property
    def any(self) -> bool:
        """Whether anything is asked that an artifact without a lock can be held to."""
        return bool(self.pattern or self.rules or self.require) or self.coverage == "all"

    def pattern_of(self, name: str) -> Pattern | None:
        """The pattern asked of a site."""
        for rule in self.rules:
            if named(name, rule.sites):
                return rule.pattern
        return self.pattern


def named(name: str, targets: Iterable[str]) -> bool:
    """Whether one of several targets names a site."""
    return any(is_target(name, target) for target in targets)


_FILES = (".safetensors", ".onnx")
_MARKS = (MANIFEST, ADAPTER_CONFIG, "config.json", LOCK_NAME)


@dataclass(frozen=True)
class Check:
    """An artifact with everything it is held to.

    Attributes:
        lock: a lock file; None takes the one beside the artifact, if there is one.
        against: another artifact, whose masks must be the same.
        trust_remote_code: run code that a model folder brings, where its sites have to be found.
    """

    path: Path
    demands: Demands = field(default_factory=Demands)
    lock: Path | None = None
    against: Path | None = None
    trust_remote_code: bool = False


def check_request(check: Check) -> None:
    """Refuse a request that is wrong whatever the artifact holds; what is wrong later on is damage.

    Raises:
        UsageError: the artifact, the lock or the artifact to compare with is not there, or is nothing of the
            kind; the artifact is a part of another one; there is nothing to hold it to.
    """
    _check_artifact(check.path)
    if check.lock is not None:
        regular_file_size(check.lock)
    if check.against is not None:
        _check_artifact(check.against)
    elif check.lock is None and not check.demands.any and not os.path.lexists(_lock_beside(check.path)):
        _check_problems(check.path)


def nothing_to_hold_to(path: Path) -> UsageError:
    return UsageError(
        f"{path}: nothing to hold it to: it has no {LOCK_NAME}; "
        "give --pattern 2:4, --lock FILE or --against ARTIFACT"
    )


def _check_artifact(path: Path) -> None:
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist")
    if path.suffix not in _FILES and not _was_one(path):
        raise UsageError(f"{path} is not a model, adapter or export folder, nor a .safetensors or .onnx file")
    if path.suffix == ".safetensors":
        try:
            refuse_part_of_export(path)
        except UsageError:
            raise
        except SppFxError:
            return  # the export is damaged, which is a verdict


def _was_one(folder: Path) -> bool:
    """Whether a folder is an artifact, or what is left of one: without its config.json, or without weights."""
    if any(os.path.lexists(folder / mark) for mark in _MARKS):
        return True
    try:
        return folder.is_dir() and any(path.suffix in _FILES for path in folder.iterdir())
    except OSError:
        return True  # whoever opens it will tell why it cannot be read


def _lock_beside(path: Path) -> Path:
    return (path.parent if path.suffix in _FILES else path) / LOCK_NAME


def _check_problems(path: Path) -> None:
    """An artifact of which nothing is asked is one to be judged only if it is wrong by itself."""
    try:
        artifact = open_artifact(path)
    except (SppFxError, OSError):
        return
    if not artifact.problems and artifact.lock is None:
        raise nothing_to_hold_to(path)


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


POLICY_NAME = "spp-fx.toml"


@dataclass(frozen=True)
class Overrides:
    """Options of a command line: each that is given replaces the policy's key of that name.

    `pattern` is asked of every site, so that it replaces the policy's rules as well. No policy can allow code to
    run: `trust_remote_code` is the command line's alone.
    """

    pattern: str | None = None
    lock: Path | None = None
    against: Path | None = None
    coverage: Coverage | None = None
    require: tuple[str, ...] = ()
    allow_dense: tuple[str, ...] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Policy:
    """A policy file that was read; without one, nothing is asked and no artifact is named."""

    path: Path | None = None
    _verify: "VerifyTable | None" = field(default=None, repr=False)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file.

        Raises:
            UsageError: as `policy_file.read_policy`.
        """

        return cls(path, read_policy(path))

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
        for entry in self._entries():
            if is_glob(entry.path) and any(path.resolve() == real for path in self._expand(entry)):
                return self._check(artifact, entry, given)
        return self._check(artifact, None, given)

    def checks(self, given: Overrides = Overrides()) -> list[Check]:
        """Every artifact of the policy, in its order; entries are preferred as in `check`.

        Raises:
            UsageError: it names none, one that is not there, or spells one out twice; a lock or an artifact
                to compare with was given for more than one.
        """
        if not self._entries():
            raise UsageError(
                f"{self.path}: names no artifact; add [[verify.artifact]] with a path, or give ARTIFACT "
                "('.' is this folder)"
            )
        spelt_out = self._spelt_out()
        found: dict[Path, Check] = {}
        for number, entry in enumerate(self._entries()):
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

    def _entries(self) -> "list[ArtifactTable]":
        return self._verify.artifact if self._verify else []

    def _spelt_out(self) -> dict[Path, "ArtifactTable"]:
        """The entries without globs by their files, links followed; UsageError for two of the same file."""
        found: dict[Path, ArtifactTable] = {}
        for entry in self._entries():
            if is_glob(entry.path):
                continue
            other = found.setdefault((self._root() / entry.path).resolve(), entry)
            if other is not entry:
                raise UsageError(
                    f"{self.path}: {other.path!r} and {entry.path!r} are the same artifact; name it once"
                )
        return found

    def _expand(self, entry: "ArtifactTable") -> Sequence[Path]:
        root = self._root()
        if not is_glob(entry.path):
            return [root / entry.path]
        names = glob.glob(entry.path, root_dir=root, recursive=True)
        return [root / name for name in sorted(names)]

    def _check(self, path: Path, entry: "ArtifactTable | None", given: Overrides) -> Check:
        def asked(key: str) -> Any:
            said = (getattr(table, key) for table in (entry, self._verify) if table)
            return next((value for value in said if value is not None), None)

        everywhere = given.pattern is not None
        rules: list[RuleTable] = [] if everywhere else asked("rule") or []
        demands = Demands.of(
            given.pattern if everywhere else asked("pattern"),
            rules=[(rule.sites, rule.pattern) for rule in rules],
            require=given.require or asked("require") or (),
            allow_dense=given.allow_dense or asked("allow_dense") or (),
            coverage=given.coverage or asked("coverage") or "lock",
        )
        lock = self._root() / entry.lock if entry and entry.lock else None
        against = self._root() / entry.against if entry and entry.against else None
        return Check(path, demands, given.lock or lock, given.against or against, given.trust_remote_code)

    def _root(self) -> Path:
        return self.path.parent if self.path else Path()
