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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_fx.errors import UsageError
from spp_fx.ir.names import is_glob
from spp_fx.workflows.demands import Coverage, Demands
from spp_fx.workflows.request import Check

if TYPE_CHECKING:
    from spp_fx.workflows.policy_file import ArtifactTable, RuleTable, VerifyTable

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
        from spp_fx.workflows.policy_file import read_policy  # loaded only where there is a policy

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
