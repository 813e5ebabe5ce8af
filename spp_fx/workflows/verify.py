"""verify: an artifact against its lock, a pattern, or another artifact, site by site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from spp_fx.errors import SppFxError, UsageError
from spp_fx.sparsity import (
    LOCK_NAME,
    Lock,
    LockEntry,
    PackedMask,
    Pattern,
    Scan,
    compare,
    compare_masks,
    load_lock,
    parse_pattern,
    scan_bits,
)
from spp_fx.workflows.artifact import Artifact, each, open_artifact
from spp_fx.workflows.survey import Tick, no_tick

Masks = Callable[[str], PackedMask]


@dataclass(frozen=True)
class SiteVerdict:
    """What verify found of one site.

    Attributes:
        violations: groups (or missing zeros) that break the pattern.
        lost_zeros, new_zeros: positions that changed; None where only a digest is known.
        mask_equal: None where there was nothing to compare with.
        reason: why it is not ok, with row and column.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    sparsity: float
    violations: int
    lost_zeros: int | None
    new_zeros: int | None
    mask_equal: bool | None
    reason: str | None
    file: str

    @property
    def ok(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        fields = ("nnz", "sparsity", "violations", "lost_zeros", "new_zeros", "mask_equal", "ok", "reason")
        return {"name": self.name, "shape": list(self.shape)} | {key: getattr(self, key) for key in fields}


@dataclass(frozen=True)
class Verified:
    """The verdict on an artifact.

    Attributes:
        problems: why the artifact as a whole must not be released, whatever its sites hold.
    """

    path: Path
    kind: str
    pattern: str | None
    sites: list[SiteVerdict]
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems and all(site.ok for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all sites."""
        total = sum(prod(site.shape) for site in self.sites if site.shape)
        return 1 - sum(site.nnz for site in self.sites) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        failed = sum(not site.ok for site in self.sites)
        return {
            "ok": self.ok,
            "kind": self.kind,
            "pattern": self.pattern,
            "problems": list(self.problems),
            "sites": [site.to_json() for site in self.sites],
            "summary": {
                "sites": len(self.sites),
                "ok": len(self.sites) - failed,
                "failed": failed,
                "sparsity": self.sparsity,
            },
        }


def verify(
    path: str | Path,
    *,
    pattern: str | None = None,
    lock: str | Path | None = None,
    against: str | Path | None = None,
    tick: Tick = no_tick,
) -> Verified:
    """Hold every site of an artifact to a lock (by default the one beside it), a pattern, another artifact.

    A lock is asked of the sites that it names; `pattern` and `against` of every site of the artifact.

    Raises:
        UsageError: the artifact is of no known kind, or there is nothing to hold it to.
        FormatError: a file is damaged.
        SppFxError: the lock is that of another model.
    """
    asked = parse_pattern(pattern) if pattern else None
    path = Path(path)
    artifact = open_artifact(path)
    held = load_lock(lock) if lock else artifact.lock
    other = open_artifact(Path(against)) if against else None
    if held is None and asked is None and other is None and not artifact.problems:
        raise UsageError(
            f"{path}: nothing to hold it to: it has no sparsity.lock.json; "
            "give --pattern 2:4, --lock FILE or --against ARTIFACT"
        )
    entries = held.by_name() if held else {}
    if held:
        _check_same_model(artifact, held, lock)
    sites = {entry.name: entry.transposed for entry in held.sites} if held else {}
    if held is None or asked is not None or other is not None:
        # A lock speaks of its own sites; a pattern or another artifact is asked of every site there is.
        sites = dict(sorted((dict(artifact.weights.sites()) | sites).items()))
    if not sites:
        raise SppFxError(f"{path}: it has no weight that could be verified")
    theirs = _masks(other, sites) if other else None
    verdicts: list[SiteVerdict] = []
    for name, scan in each(artifact, sites):
        verdicts.append(_judge(artifact, name, scan, asked, entries.get(name), other, theirs))
        tick(name, scan.mask.numel if scan else 0)
    locked = [verdict for verdict in verdicts if verdict.name in entries]
    wrong = [verdict for verdict in locked if entries[verdict.name].shape != verdict.shape]
    if held and wrong and len(wrong) == len(locked):
        raise SppFxError(
            f"{lock or LOCK_NAME} is the lock of another model: {wrong[0].name} has shape {list(wrong[0].shape)} in "
            f"{path}, {list(entries[wrong[0].name].shape)} in the lock"
        )
    common = asked or (held.pattern if held else None)
    return Verified(path, artifact.kind, None if common is None else str(common), verdicts, artifact.problems)


def _masks(other: Artifact, sites: Mapping[str, bool]) -> Masks:
    """The masks of another artifact, which may store a weight the other way round."""
    known = {entry.name: entry.transposed for entry in other.lock.sites} if other.lock else {}
    if sites.keys() - known.keys():
        known = dict(sites) | dict(other.weights.sites()) | known
    return lambda name: other.weights.scan(name, known[name]).mask


def _check_same_model(artifact: Artifact, lock: Lock, path: str | Path | None) -> None:
    missing = [entry.name for entry in lock.sites if entry.name not in artifact.names]
    if missing and len(missing) == len(lock.sites):
        raise SppFxError(
            f"{path or LOCK_NAME} is the lock of another model: {artifact.path} has none of its "
            f"{len(missing)} sites (first: {missing[0]})"
        )


def _judge(
    artifact: Artifact,
    name: str,
    scan: Scan | None,
    asked: Pattern | None,
    entry: LockEntry | None,
    other: Artifact | None,
    theirs: Masks | None,
) -> SiteVerdict:
    if scan is None:
        shape = entry.shape if entry else ()
        return SiteVerdict(
            name, shape, 0, 0.0, 0, None, None, None, f"{artifact.path} has no such weight", ""
        )
    mask, file = scan.mask, artifact.weights.file(name)
    reasons: list[str] = []
    if scan.first_non_finite is not None:
        reasons.append(
            f"holds {scan.non_finite} NaN or infinite values, first at {_place(scan.first_non_finite)}"
        )
    equal: bool | None = None
    lost: int | None = None
    new: int | None = None
    if other is not None and theirs is not None:
        if name in other.names:
            equal, lost, new = _exact(theirs(name), mask, f"in {other.path}", reasons)
        else:
            equal = False
            reasons.append(f"{other.path} has no such weight")
    if entry is not None:
        found = compare(entry, mask)
        equal = found.equal and equal is not False
        if found.located and other is None:
            lost, new = len(found.lost_zeros), len(found.new_zeros)
        reasons += _flips(found.lost_zeros, "zero in the lock, non-zero now")
        reasons += _flips(found.new_zeros, "non-zero in the lock, zero now")
        if found.reason:
            reasons.append(found.reason)
    violations, broken = _violations(mask, asked, entry)
    reasons += broken
    reason = f"{file}: {'; '.join(reasons)}" if reasons else None
    return SiteVerdict(name, mask.shape, mask.nnz, mask.sparsity, violations, lost, new, equal, reason, file)


def _violations(mask: PackedMask, asked: Pattern | None, entry: LockEntry | None) -> tuple[int, list[str]]:
    pattern = asked or (entry.parsed_pattern() if entry else None)
    if pattern is None:
        return 0, []
    try:
        found = scan_bits(mask, pattern)
    except SppFxError as error:
        return 1, [str(error)]
    return found.count, [found.describe(pattern)] if found.count else []


def _exact(
    then: PackedMask, now: PackedMask, where: str, reasons: list[str]
) -> tuple[bool, int | None, int | None]:
    if then.shape != now.shape:
        reasons.append(f"has shape {list(now.shape)}, {list(then.shape)} {where}")
        return False, None, None
    difference = compare_masks(then, now, limit=3)
    reasons += _flips(difference.first_lost, f"zero {where}, non-zero here")
    reasons += _flips(difference.first_new, f"non-zero {where}, zero here")
    return difference.equal, difference.lost_zeros, difference.new_zeros


def _flips(positions: list[tuple[int, int]], what: str) -> list[str]:
    return [f"{_place(position)}: {what}" for position in positions[:3]]


def _place(position: tuple[int, ...]) -> str:
    if len(position) == 3:
        return f"expert {position[0]}, row {position[1]}, column {position[2]}"
    return f"row {position[0]}, column {position[1]}"
