"""What verify checks: requirements from the command line and from spp-fx.toml; docs/verify.md has the format."""

import glob
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.sparsity.pattern import Pattern, parse_pattern
from spp_fx.sparsity.weights import is_glob, is_target
from spp_fx.storage.strict_json import StrictModel, first_fault, location, read_bytes, regular_file_size
from spp_fx.verification.artifact import not_an_artifact, open_artifact, refuse_part_of_export

POLICY_NAME = "spp-fx.toml"
_MAX_BYTES = 1 << 20
_WEIGHT_FILES = (".safetensors", ".onnx")
_ARTIFACT_FILES = (MANIFEST, "adapter_config.json", "config.json", LOCK_NAME)

Coverage = Literal["lock", "all"]


@dataclass(frozen=True)
class Rule:
    """A pattern for the sites with some names: `down_proj`, or globs over whole names such as `*.mlp.*`."""

    sites: tuple[str, ...]
    pattern: Pattern


@dataclass(frozen=True)
class Requirements:
    """What is required of sites; names are given as in `Rule.sites`.

    Attributes:
        pattern: required of every site that no rule names.
        rules: the first one that names a site has its pattern. A name that matches nothing is a failure.
        require: sites that must be sparse. A name that matches nothing is a failure.
        allow_dense: sites that need neither a pattern nor zeros; the lock still applies to them.
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
        return next((rule.pattern for rule in self.rules if named(name, rule.sites)), self.pattern)


def named(name: str, targets: Iterable[str]) -> bool:
    return any(is_target(name, target) for target in targets)


@dataclass(frozen=True)
class Check:
    """An artifact with everything that it is checked against.

    Attributes:
        lock: a lock file; None takes the one beside the artifact, if there is one.
        against: another artifact, whose masks must be equal.
        trust_remote_code: run code that a model folder brings, to find its sites.
    """

    path: Path
    requirements: Requirements = field(default_factory=Requirements)
    lock: Path | None = None
    against: Path | None = None
    trust_remote_code: bool = False

    def validate(self) -> None:
        """Raise for a check that is wrong whatever the artifact holds; later errors are damage.

        Raises:
            UsageError: the artifact, the lock or the artifact to compare with does not exist or is not one; the
                artifact is a part of another one; there is nothing to check it against.
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
        f"{path}: nothing to check it against: it has no {LOCK_NAME}; "
        "give --pattern 2:4, --lock FILE or --against ARTIFACT"
    )


def _check_is_artifact(path: Path) -> None:
    if not path.exists() or (path.suffix not in _WEIGHT_FILES and not _was_artifact(path)):
        raise not_an_artifact(path)
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
        return True  # opening it raises the reason


def _is_pattern(text: str) -> str:
    try:
        parse_pattern(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text


_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Pattern = Annotated[_Text, AfterValidator(_is_pattern)]
_Names = list[_Text]


class RuleTable(StrictModel):
    sites: Annotated[_Names, Field(min_length=1)]
    pattern: _Pattern


class _RequirementsTable(StrictModel):
    """An omitted key is None: the default applies."""

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
    artifact: list[ArtifactTable] = Field(default_factory=list[ArtifactTable])

    @model_validator(mode="after")
    def _once(self) -> "VerifyTable":
        paths = [os.path.normpath(artifact.path) for artifact in self.artifact]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"two artifacts have the path {twice[0]!r}")
        return self


class _File(StrictModel):
    verify: VerifyTable = VerifyTable()


_TABLES: Mapping[tuple[str, ...], type[StrictModel]] = {
    (): _File,
    ("verify",): VerifyTable,
    ("verify", "rule"): RuleTable,
    ("verify", "artifact"): ArtifactTable,
    ("verify", "artifact", "rule"): RuleTable,
}


def _fault(error: ValidationError) -> str:
    """As `first_fault`; for an unknown key, those that are known."""
    fault = error.errors(include_url=False, include_input=False)[0]
    if fault["type"] != "extra_forbidden":
        return first_fault(error)
    table = tuple(part for part in fault["loc"][:-1] if isinstance(part, str))
    return f"{location(fault['loc'])}: unknown key; known: {', '.join(_TABLES[table].model_fields)}"


@dataclass(frozen=True)
class Overrides:
    """Command-line options; each that is given replaces the policy's key of that name.

    `pattern` is required of every site and therefore replaces the rules as well. A policy cannot set
    `trust_remote_code`.
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
    """The content of a policy file; without one, nothing is required and no artifact is named."""

    path: Path | None = None
    _verify: VerifyTable = field(default_factory=VerifyTable, repr=False)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file; UsageError names the file and what is wrong, with the key where there is one."""
        try:
            text = read_bytes(path, _MAX_BYTES).decode("utf-8-sig")  # some editors of Windows put a BOM first
            return cls(path, _File.model_validate(tomllib.loads(text)).verify)
        except ValidationError as error:
            raise UsageError(f"{path}: {_fault(error)}") from error
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
            raise UsageError(f"{path}: is not TOML: {error}") from error
        except SppFxError as error:
            raise UsageError(str(error)) from error

    @classmethod
    def find(cls, explicit: Path | None = None, folder: Path = Path()) -> "Policy":
        """The policy that was given, else spp-fx.toml of a folder, else an empty one; raises as `load`."""
        if explicit is not None:
            return cls.load(explicit)
        path = folder / POLICY_NAME
        return cls.load(path) if os.path.lexists(path) else cls()

    def check(self, artifact: Path, given: Overrides = Overrides()) -> Check:
        """The check of one artifact, by its entry in the policy if it has one.

        An entry with the exact path takes precedence over globs; among globs, the first match wins.

        Raises:
            UsageError: two entries have the path of the same artifact.
        """
        real = artifact.resolve()
        if (own := self._exact_paths().get(real)) is not None:
            return self._check(artifact, own, given)
        for entry in self._verify.artifact:
            if is_glob(entry.path) and any(path.resolve() == real for path in self._expand(entry)):
                return self._check(artifact, entry, given)
        return self._check(artifact, None, given)

    def checks(self, given: Overrides = Overrides()) -> list[Check]:
        """The check of every artifact in the policy, in its order; the precedence is that of `check`.

        Raises:
            UsageError: the policy names no artifact, one that does not exist, or one twice; `given` has a lock or
                an artifact to compare with, and there are several artifacts.
        """
        if not self._verify.artifact:
            raise UsageError(
                f"{self.path}: names no artifact; add [[verify.artifact]] with a path, or give ARTIFACT "
                "('.' is this folder)"
            )
        exact = self._exact_paths()
        found: dict[Path, Check] = {}
        for number, entry in enumerate(self._verify.artifact):
            paths = self._expand(entry)
            if not paths or not all(os.path.lexists(path) for path in paths):
                what = "matches nothing" if is_glob(entry.path) else "does not exist"
                raise UsageError(f"{self.path}: verify.artifact[{number}].path: {entry.path!r} {what}")
            for path in paths:
                real = path.resolve()
                found.setdefault(real, self._check(path, exact.get(real, entry), given))
        if len(found) > 1 and (given.lock or given.against):
            option = "--lock" if given.lock else "--against"
            raise UsageError(f"{option} takes one artifact, {self.path} names {len(found)}; give ARTIFACT")
        return list(found.values())

    def _exact_paths(self) -> dict[Path, ArtifactTable]:
        """The entries without globs by their resolved paths; UsageError for two with the same one."""
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
