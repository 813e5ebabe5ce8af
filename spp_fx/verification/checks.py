"""Which sites are checked for what, and the check of one site: its lock entry, a pattern, another artifact."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from spp_fx.errors import FormatError, PatternError
from spp_fx.graph.names import is_glob, is_target
from spp_fx.sparsity.lock import Lock, LockEntry, Position, compare, compare_masks
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern, detect_pattern, scan_bits
from spp_fx.sparsity.scan import is_matrix
from spp_fx.verification.artifact import Artifact
from spp_fx.verification.policy import Requirements, named
from spp_fx.verification.verdict import Finding, SiteVerdict

_SHOWN = 3  # changed positions named in each direction


@dataclass(frozen=True)
class SiteCheck:
    """What is checked of one site.

    Attributes:
        transposed: it is stored (in, out).
        entry: what the lock says of it.
        pattern: required by the caller; None leaves it to the lock.
        sparse: it must not be dense.
        unlocked: the lock should name it and does not.
        unreadable: why its zeros cannot be read although something is stored for it.
        transposed_there: the artifact it is compared with stores it (in, out).
    """

    name: str
    transposed: bool
    entry: LockEntry | None
    pattern: Pattern | None
    sparse: bool = False
    unlocked: bool = False
    unreadable: str | None = None
    transposed_there: bool = False

    @property
    def expected_pattern(self) -> Pattern | None:
        return self.pattern or (self.entry.parsed_pattern() if self.entry else None)


@dataclass(frozen=True)
class Plan:
    """What is checked of an artifact.

    Attributes:
        checks: by name, sorted.
        faults: names that were required and match nothing; what the lock says and the model does not.
        allowed_dense: sites that are not checked because they may be dense.
        left_out, unread: matrices that are not checked, each with the reason; see `Sites`.
    """

    checks: tuple[SiteCheck, ...]
    faults: tuple[Finding, ...]
    allowed_dense: tuple[str, ...]
    left_out: dict[str, str]
    unread: dict[str, str]


def plan_checks(
    artifact: Artifact, lock: Lock | None, requirements: Requirements, against: Artifact | None
) -> Plan:
    """Decide what is checked of which site.

    A lock is checked for the sites that it names; a pattern for every site of the artifact, whether it is there
    or not; another artifact for the sites of both, unless this one is only a part of a model. The model is
    traced to find those only where the lock's own do not answer. Where it is, the tracing says how they are
    stored.

    Raises:
        UsageError: the artifact's sites are needed and cannot be found.
    """
    locked = lock.by_name() if lock else {}
    known = {name: entry.transposed for name, entry in locked.items()}
    unreadable: Mapping[str, str] = {}
    left_out: dict[str, str] = {}
    unread = _not_in_lock(artifact, locked)
    faults: list[Finding] = []
    every_site = (
        lock is None
        or against is not None
        or requirements.pattern is not None
        or bool(requirements.rules)
        or requirements.coverage == "all"
        or _required_beyond(requirements.require, artifact.names, locked)
    )
    if every_site:
        unreadable = artifact.sites.unreadable
        known = dict.fromkeys(unreadable, False) | _orientations(artifact, lock)
        left_out, unread = dict(artifact.sites.left_out), dict(artifact.sites.unread)
        faults += _turned(artifact, locked, known)
    by_name_only: set[str] = set()
    there: Mapping[str, bool] = {}
    if against is not None:
        there = _said(against.lock) if against.guessed else _orientations(against, against.lock)
        if not artifact.part:
            own, known = known, _joined(artifact, lock, known, against)
            if against.guessed:  # what is a site by its name alone must be the same, and need not be sparse
                by_name_only = known.keys() - own.keys()
    required = _required(requirements, known, artifact, faults)
    everything = requirements.coverage == "all"
    nothing_required = lock is None and against is None and not requirements.any
    checks: list[SiteCheck] = []
    allowed: list[str] = []
    for name in sorted(known.keys() | required):
        entry = locked.get(name)
        excused = name in by_name_only or named(name, requirements.allow_dense)
        no_pattern = everything and (lock is None or (entry is not None and entry.pattern is None))
        check = SiteCheck(
            name,
            known.get(name, False),
            entry,
            pattern=None if excused else requirements.pattern_of(name),
            sparse=not excused and (name in required or no_pattern),
            unlocked=not excused and everything and lock is not None and entry is None,
            unreadable=unreadable.get(name),
            transposed_there=there.get(name, known.get(name, False)),
        )
        checked = entry or check.pattern or check.sparse or check.unlocked
        if checked or against is not None or nothing_required:
            checks.append(check)
        elif excused:
            allowed.append(name)
    considered = {check.name for check in checks}.union(allowed)
    left_out = {name: reason for name, reason in left_out.items() if name not in considered}
    unread = {name: reason for name, reason in unread.items() if name not in considered}
    allowed += [name for name in unread if named(name, requirements.allow_dense)]
    unread = {name: reason for name, reason in unread.items() if name not in allowed}
    if everything:
        faults += [
            Finding(
                "unread-weight",
                f"{name}: {reason}, so it was not looked at; allow it to be dense, or remove it",
            )
            for name, reason in sorted(unread.items())
        ]
    return Plan(tuple(checks), tuple(faults), tuple(allowed), left_out, unread)


def _not_in_lock(artifact: Artifact, locked: Mapping[str, LockEntry]) -> dict[str, str]:
    """The matrices that a lock does not name, where only the lock is checked."""
    shape = artifact.shape
    matrices = (name for name in artifact.names if shape is None or is_matrix(shape(name)))
    return {name: "the lock does not name it" for name in sorted(matrices) if name not in locked}


def _said(lock: Lock | None) -> dict[str, bool]:
    """How sites are stored, as a lock says."""
    return {entry.name: entry.transposed for entry in lock.sites} if lock else {}


def _orientations(artifact: Artifact, lock: Lock | None) -> dict[str, bool]:
    """An artifact's sites and those of a lock of it: name -> stored (in, out)?

    Tracing is more reliable than a lock, and a lock than a name.
    """
    found, said = dict(artifact.sites.transposed), _said(lock)
    return found | said if artifact.guessed else said | found


def _joined(
    artifact: Artifact, lock: Lock | None, known: Mapping[str, bool], against: Artifact
) -> dict[str, bool]:
    """The sites of two artifacts, stored as this one stores them; as the other does where names only suggest."""
    theirs = _orientations(against, against.lock)
    if not artifact.guessed or against.guessed:
        return theirs | dict(known)
    return dict(known) | theirs | _said(lock)


def _turned(artifact: Artifact, locked: Mapping[str, LockEntry], known: Mapping[str, bool]) -> list[Finding]:
    """A finding if the lock has sites the other way round than the model."""
    turned = [name for name, entry in locked.items() if known[name] != entry.transposed]
    if not turned:
        return []
    stored, said = ("(in, out)", "(out, in)") if known[turned[0]] else ("(out, in)", "(in, out)")
    more = f", and {len(turned) - 1} more sites the other way round" if len(turned) > 1 else ""
    message = (
        f"the lock has {turned[0]} stored {said}{more}, the model stores it {stored}; "
        f"make the lock of {artifact.path} again with spp-fx lock"
    )
    return [Finding("artifact-damaged", message)]


def _required_beyond(targets: tuple[str, ...], names: Iterable[str], locked: Mapping[str, LockEntry]) -> bool:
    """Whether a required name may be that of a weight that the lock does not name. A bias is not a weight."""
    return bool(targets) and any(
        name not in locked and not name.endswith(".bias") and named(name, targets) for name in names
    )


def _required(
    requirements: Requirements, known: Mapping[str, bool], artifact: Artifact, faults: list[Finding]
) -> set[str]:
    """The sites that must be sparse. Each name in the requirements that matches nothing is a fault.

    A name that is spelt out may also be that of a matrix that is not a site by itself, as lm_head.
    """
    required: set[str] = set()
    for target in requirements.require:
        candidates = known.keys() if is_glob(target) else known.keys() | artifact.names
        hits = {name for name in candidates if is_target(name, target)}
        required |= hits
        if not hits:
            faults.append(_matches_nothing(target, "which must be sparse", artifact))
    for rule in requirements.rules:
        for target in rule.sites:
            if not any(is_target(name, target) for name in known):
                faults.append(_matches_nothing(target, f"which must be {rule.pattern}", artifact))
    return required


def _matches_nothing(target: str, what: str, artifact: Artifact) -> Finding:
    return Finding(
        "missing-weight",
        f"no site of {artifact.path} is named {target!r}, {what}; it was renamed or left out, or the rule is old",
    )


def check_site(artifact: Artifact, check: SiteCheck, against: Artifact | None) -> SiteVerdict:
    """Scan a site and compare it with what it should be; the result holds no mask.

    Raises:
        FormatError: the weight cannot be read, here or in the other artifact.
    """
    name, entry, pattern = check.name, check.entry, check.expected_pattern
    expected = None if pattern is None else str(pattern)
    if check.unreadable is not None:
        raise FormatError(
            f"{artifact.path}: {name}: {check.unreadable}; it cannot be looked at. Verify the model "
            "in another form, or allow the site to be dense"
        )
    if name not in artifact.names:
        absent = Finding("missing-weight", f"{artifact.path} has no such weight")
        return SiteVerdict(name, entry.shape if entry else (), pattern=expected, findings=(absent,))
    scan = artifact.scan(name, check.transposed)
    mask, findings = scan.mask, list[Finding]()
    if scan.first_non_finite is not None:
        position = _position(scan.first_non_finite)
        message = f"holds {scan.non_finite} NaN or infinite values, first at {position}"
        findings.append(Finding("non-finite", message, position))
    changes: list[_MaskChange] = []
    if against is not None:
        changes.append(_change_against(against, check, mask))
    if entry is not None:
        changes.append(_change_from_lock(entry, mask))
    findings += [finding for change in changes for finding in change.findings]
    violations, broken = _pattern_findings(mask, pattern)
    findings += broken
    if check.sparse or check.unlocked:
        findings += _dense_finding(check, mask, pattern if not violations else None)
    return SiteVerdict(
        name=name,
        shape=mask.shape,
        nnz=mask.nnz,
        sparsity=mask.sparsity,
        violations=violations,
        lost_zeros=changes[0].lost if changes else None,
        new_zeros=changes[0].new if changes else None,
        mask_equal=all(change.equal for change in changes) if changes else None,
        file=artifact.file(name),
        pattern=expected,
        findings=tuple(findings),
    )


class _MaskChange(NamedTuple):
    """How a mask differs from another one; `lost` and `new` zeros are None where only a digest is known."""

    equal: bool
    lost: int | None
    new: int | None
    findings: list[Finding]


def _change_against(against: Artifact, check: SiteCheck, now: PackedMask) -> _MaskChange:
    where = f"in {against.path}"
    if check.name not in against.names:
        absent = Finding("missing-weight", f"{against.path} has no such weight")
        return _MaskChange(False, None, None, [absent])
    then = against.scan(check.name, check.transposed_there).mask
    if then.shape != now.shape:
        message = f"has shape {list(now.shape)}, {list(then.shape)} {where}"
        return _MaskChange(False, None, None, [Finding("mask-changed", message)])
    found = compare_masks(then, now, limit=_SHOWN)
    findings = [
        *_flips(found.first_lost, found.lost_zeros, f"zero {where}, non-zero here", now.shape),
        *_flips(found.first_new, found.new_zeros, f"non-zero {where}, zero here", now.shape),
    ]
    return _MaskChange(found.equal, found.lost_zeros, found.new_zeros, findings)


def _change_from_lock(entry: LockEntry, mask: PackedMask) -> _MaskChange:
    found = compare(entry, mask)
    lost, new = len(found.lost_zeros), len(found.new_zeros)
    findings = [
        *_flips(found.lost_zeros, lost, "zero in the lock, non-zero now", mask.shape),
        *_flips(found.new_zeros, new, "non-zero in the lock, zero now", mask.shape),
    ]
    if found.reason:
        findings.append(Finding("mask-changed", found.reason))
    if not found.located:
        return _MaskChange(found.equal, None, None, findings)
    return _MaskChange(found.equal, lost, new, findings)


def _flips(positions: list[Position], count: int, what: str, shape: tuple[int, ...]) -> list[Finding]:
    """The first positions, each a finding; the last one says how many there are in all."""
    shown = [_position(_unfolded(position, shape)) for position in positions[:_SHOWN]]
    messages = [f"{position}: {what}" for position in shown]
    if count > len(shown) > 0:
        messages[-1] += f" ({count} in all)"
    return [
        Finding("mask-changed", message, position) for message, position in zip(messages, shown, strict=True)
    ]


def _pattern_findings(mask: PackedMask, pattern: Pattern | None) -> tuple[int, list[Finding]]:
    """How many groups (or missing zeros) break a pattern, and the first of them."""
    if pattern is None:
        return 0, []
    try:
        found = scan_bits(mask, pattern)
    except PatternError as error:
        return 1, [Finding("pattern-broken", str(error))]
    if not found.count:
        return 0, []
    if found.first is None:
        return found.count, [Finding("pattern-broken", found.describe(pattern))]
    *expert, row, _ = _unfolded((found.first.row, 0), mask.shape)
    where = f"expert {expert[0]}, " if expert else ""
    first = found.first._replace(row=row)
    message = where + type(found)(found.count, first).describe(pattern)
    position = f"{where}row {row}, columns {first.col_start}-{first.col_end - 1}"
    return found.count, [Finding("pattern-broken", message, position)]


def _dense_finding(check: SiteCheck, mask: PackedMask, pattern: Pattern | None) -> list[Finding]:
    """That a site is dense, or not locked; `pattern` is one that it is known to hold."""
    found = pattern or detect_pattern(mask)
    density = f"is dense ({mask.sparsity:.2%} zeros)" if found is None else f"holds {found}"
    if check.unlocked:
        message = f"{density}, and the lock does not name it; lock it, or allow it to be dense"
        return [Finding("dense-site", message)]
    if found is not None:
        return []
    return [Finding("dense-site", f"{density}, and must be sparse; prune it, or allow it to be dense")]


def _unfolded(position: Position, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(row, column) of a flattened stack as (expert, row, column); of a matrix as it is."""
    row, column = position
    return (*divmod(row, shape[1]), column) if len(shape) == 3 else (row, column)


def _position(index: tuple[int, ...]) -> str:
    *expert, row, column = index
    return f"{f'expert {expert[0]}, ' if expert else ''}row {row}, column {column}"
