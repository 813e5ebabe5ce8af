"""What verify checks: requirements from the command line and from spp-fx.toml.

[verify]                            # requirements of every artifact
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
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.graph.names import is_glob, is_target
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.sparsity.pattern import Pattern, parse_pattern
from spp_fx.storage.strict_json import regular_file_size
from spp_fx.verification.artifact import open_artifact, refuse_part_of_export

POLICY_NAME = "spp-fx.toml"
_MAX_BYTES = 1 << 20
_WEIGHT_FILES = (".safetensors", ".onnx")
_ARTIFACT_FILES = (MANIFEST, "adapter_config.json", "config.json", LOCK_NAME)

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
class Requirements:
    """What is required of sites; names are given as in `Rule.sites`.

    Attributes:
        pattern: required of every site that no rule names.
        rules: the first one that names a site states its pattern. A name that matches nothing is a failure.
        require: sites that must be sparse. A name that matches nothing is a failure.
        allow_dense: sites that need neither a pattern nor zeros. A lock that names one still holds.
        coverage: `all` requires that every site of the model is in the lock (without a lock: is sparse) and that
            no weight is left unread, except those of `allow_dense`.
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
        """Requirements with patterns as users write them; UsageError for text that is not a pattern."""
        return cls(
            parse_pattern(pattern) if pattern is not None else None,
            tuple(Rule(tuple(sites), parse_pattern(text)) for sites, text in rules),
            tuple(require),
            tuple(allow_dense),
            coverage,
        )

    @property
    def any(self) -> bool:
        """Whether something is required that an artifact without a lock can be checked for."""
        return bool(self.pattern or self.rules or self.require) or self.coverage == "all"

    def pattern_of(self, name: str) -> Pattern | None:
        """The pattern that a site must hold."""
        return next((rule.pattern for rule in self.rules if named(name, rule.sites)), self.pattern)


def named(name: str, targets: Iterable[str]) -> bool:
    """Whether one of several targets names a site."""
    return any(is_target(name, target) for target in targets)


@dataclass(frozen=True)
class Check:
    """An artifact with everything that it is checked against.

    Attributes:
        lock: a lock file; None takes the one beside the artifact, if there is one.
        against: another artifact, whose masks must be the same.
        trust_remote_code: run code that a model folder brings, where its sites have to be found.
    """

    path: Path
    requirements: Requirements = field(default_factory=Requirements)
    lock: Path | None = None
    against: Path | None = None
    trust_remote_code: bool = False

    def validate(self) -> None:
        """Raise for a check that is wrong whatever the artifact holds; what is wrong later on is damage.

        Raises:
            UsageError: the artifact, the lock or the artifact to compare with does not exist or is nothing of
                the kind; the artifact is a part of another one; there is nothing to check it against.
        """
        _check_is_artifact(self.path)
        if self.lock is not None:
            regular_file_size(self.lock)
        if self.against is not None:
            _check_is_artifact(self.against)
        if self.lock is not None or self.against is not None or self.requirements.any:
            return
        folder = self.path.parent if self.path.suffix in _WEIGHT_FILES else self.path
        if os.path.lexists(folder / LOCK_NAME):
            return
        try:
            artifact = open_artifact(self.path)
        except (SppFxError, OSError):
            return  # damage, which is a verdict
        if not artifact.problems and artifact.lock is None:
            raise nothing_to_check(self.path)


def nothing_to_check(path: Path) -> UsageError:
    return UsageError(
        f"{path}: nothing to hold it to: it has no {LOCK_NAME}; "
        "give --pattern 2:4, --lock FILE or --against ARTIFACT"
    )


def _check_is_artifact(path: Path) -> None:
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist")
    if path.suffix not in _WEIGHT_FILES and not _was_artifact(path):
        raise UsageError(f"{path} is not a model, adapter or export folder, nor a .safetensors or .onnx file")
    if path.suffix == ".safetensors":
        try:
            refuse_part_of_export(path)
        except UsageError:
            raise
        except SppFxError:
            return  # the export is damaged, which is a verdict


def _was_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact, or what is left of one: without its config.json, or without weights."""
    if any(os.path.lexists(folder / name) for name in _ARTIFACT_FILES):
        return True
    try:
        return folder.is_dir() and any(path.suffix in _WEIGHT_FILES for path in folder.iterdir())
    except OSError:
        return True  # opening it will tell why it cannot be read


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


class _RequirementsTable(_Strict):
    """A key that is left out is None, so that a default can stand for it."""

    pattern: _Pattern | None = None
    coverage: Coverage | None = None
    require: _Names | None = None
    allow_dense: _Names | None = None
    rule: list[RuleTable] | None = None


class ArtifactTable(_RequirementsTable):
    path: _Text
    lock: _Text | None = None
    against: _Text | None = None


class VerifyTable(_RequirementsTable):
    artifact: list[ArtifactTable] = []

    @model_validator(mode="after")
    def _once(self) -> "VerifyTable":
        paths = [os.path.normpath(artifact.path) for artifact in self.artifact]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"two artifacts have the path {twice[0]!r}")
        return self


class _File(_Strict):
    verify: VerifyTable = VerifyTable()


_TABLES: Mapping[tuple[str, ...], type[_Strict]] = {
    (): _File,
    ("verify",): VerifyTable,
    ("verify", "rule"): RuleTable,
    ("verify", "artifact"): ArtifactTable,
    ("verify", "artifact", "rule"): RuleTable,
}


def _first_fault(error: ValidationError) -> str:
    """The key and what is wrong with it; for an unknown key, those that are known."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        table = tuple(part for part in fault["loc"][:-1] if isinstance(part, str))
        text = f"unknown key; known: {', '.join(_TABLES[table].model_fields)}"
    return f"{where.lstrip('.') or 'the file'}: {text}"[:400]


@dataclass(frozen=True)
class Overrides:
    """Options of a command line: each that is given replaces the policy's key of that name.

    `pattern` is required of every site, so that it replaces the policy's rules as well. No policy can allow code
    to run: `trust_remote_code` is the command line's alone.
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
    """A policy file that was read; without one, nothing is required and no artifact is named."""

    path: Path | None = None
    _verify: VerifyTable = field(default_factory=VerifyTable, repr=False)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file.

        Raises:
            UsageError: it does not exist, is not a regular file, too large or not TOML, or a key is unknown or
                of a wrong kind; names the file and the key.
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
        """The policy that was given, else spp-fx.toml of a folder, else an empty one.

        Raises:
            UsageError: as `load`; also for a folder of that name or a link that leads nowhere: that is not the
                same as no policy.
        """
        if explicit is not None:
            return cls.load(explicit)
        path = folder / POLICY_NAME
        return cls.load(path) if os.path.lexists(path) else cls()

    def check(self, artifact: Path, given: Overrides = Overrides()) -> Check:
        """The check of one artifact: its own entry in the policy, if it has one, and the defaults.

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
        """The check of every artifact of the policy, in its order; entries are preferred as in `check`.

        Raises:
            UsageError: it names none, one that does not exist, or spells one out twice; a lock or an artifact
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

    def _spelt_out(self) -> dict[Path, ArtifactTable]:
        """The entries without globs by their files, links followed; UsageError for two of the same file."""
        found: dict[Path, ArtifactTable] = {}
        for entry in self._verify.artifact:
            if is_glob(entry.path):
                continue
            other = found.setdefault((self._root / entry.path).resolve(), entry)
            if other is not entry:
                raise UsageError(
                    f"{self.path}: {other.path!r} and {entry.path!r} are the same artifact; name it once"
                )
        return found

    def _expand(self, entry: ArtifactTable) -> Sequence[Path]:
        if not is_glob(entry.path):
            return [self._root / entry.path]
        names = glob.glob(entry.path, root_dir=self._root, recursive=True)
        return [self._root / name for name in sorted(names)]

    def _check(self, path: Path, entry: ArtifactTable | None, given: Overrides) -> Check:
        def key(name: str) -> Any:
            """The artifact's own value, else the one for all artifacts."""
            own = getattr(entry, name) if entry else None
            return own if own is not None else getattr(self._verify, name)

        rules: list[RuleTable] = key("rule") or [] if given.pattern is None else []
        requirements = Requirements.of(
            key("pattern") if given.pattern is None else given.pattern,
            rules=[(rule.sites, rule.pattern) for rule in rules],
            require=given.require or key("require") or (),
            allow_dense=given.allow_dense or key("allow_dense") or (),
            coverage=given.coverage or key("coverage") or "lock",
        )
        lock = self._root / entry.lock if entry and entry.lock else None
        against = self._root / entry.against if entry and entry.against else None
        return Check(
            path, requirements, given.lock or lock, given.against or against, given.trust_remote_code
        )

    @property
    def _root(self) -> Path:
        return self.path.parent if self.path else Path()
