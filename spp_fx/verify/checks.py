"""Which sites are asked what, and one site checked against its lock, a pattern and another artifact."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spp_fx.errors import FormatError, PatternError
from spp_fx.graph.names import is_glob, is_target
from spp_fx.sparsity.lock import Lock, LockEntry, Position, compare, compare_masks
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern, detect_pattern, scan_bits
from spp_fx.sparsity.scan import Scan, is_matrix
from spp_fx.verify.artifact import Artifact
from spp_fx.verify.policy import Demands, named
from spp_fx.verify.verdict import Finding, SiteVerdict


@dataclass(frozen=True)
class Question:
    """What is asked of one site.

    Attributes:
        transposed: it is stored (in, out).
        entry: what the lock says of it.
        pattern: asked by the caller; None leaves it to the lock.
        sparse: it must not be dense.
        unlocked: the lock should speak of it and does not.
        refusal: why its weight cannot be looked at although something is stored for it.
    """

    name: str
    transposed: bool
    entry: LockEntry | None
    pattern: Pattern | None
    sparse: bool = False
    unlocked: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked of an artifact.

    Attributes:
        questions: by name, sorted.
        faults: names that were asked for and match nothing; what the lock says and the model does not.
        allowed_dense: sites of which nothing is asked because they may be dense.
        left_out, unread: matrices of which nothing is asked, each with the reason; see `Weights`.
    """

    questions: tuple[Question, ...]
    faults: tuple[Finding, ...]
    allowed_dense: tuple[str, ...]
    left_out: dict[str, str]
    unread: dict[str, str]


def plan(artifact: Artifact, lock: Lock | None, demands: Demands, *, against: Artifact | None = None) -> Plan:
    """Turn a lock and demands into questions.

    A lock is asked of the sites that it names; a pattern of every site of the artifact, be it there or not;
    another artifact of the sites of both, unless this one is but a part of a model. The model is traced to
    find those only where the lock's own do not answer. Where it is, the tracing says how they are stored.

    Raises:
        UsageError: the artifact's sites are needed and cannot be found.
    """
    locked = lock.by_name() if lock else {}
    known = {name: entry.transposed for name, entry in locked.items()}
    refused: Mapping[str, str] = {}
    faults: list[Finding] = []
    compared = against is not None
    whole = compared or demands.pattern or demands.rules or demands.coverage == "all"
    left_out: dict[str, str] = {}
    unread = _unlocked(artifact, locked)
    if lock is None or whole or _required_beyond(demands.require, artifact.names, locked):
        refused = artifact.weights.refused()
        known = dict.fromkeys(refused, False) | orientations(artifact, lock)
        faults += _turned(artifact, locked, known)
        left_out, unread = dict(artifact.weights.left_out()), dict(artifact.weights.unread())
    suggested: set[str] = set()
    if against is not None and not artifact.part:
        own, known = known, _joined(artifact, lock, known, against)
        if (
            against.weights.guessed
        ):  # what is a site by its name alone must be the same, and need not be sparse
            suggested = known.keys() - own.keys()
    required: set[str] = set()
    for target in demands.require:
        hits = _hits(target, known, artifact.names)
        required |= hits
        if not hits:
            faults.append(_matches_nothing(target, "which must be sparse", artifact))
    for rule in demands.rules:
        for target in rule.sites:
            if not any(is_target(name, target) for name in known):
                faults.append(_matches_nothing(target, f"which must be {rule.pattern}", artifact))
    all_sparse = demands.coverage == "all" and lock is None
    nothing_asked = lock is None and not compared and not demands.any
    questions: list[Question] = []
    allowed: list[str] = []
    for name in sorted(known.keys() | required):
        entry = locked.get(name)
        excused = name in suggested or named(name, demands.allow_dense)
        unsaid = demands.coverage == "all" and entry is not None and entry.pattern is None
        question = Question(
            name,
            known.get(name, False),
            entry,
            pattern=None if excused else demands.pattern_of(name),
            sparse=not excused and (name in required or all_sparse or unsaid),
            unlocked=not excused and demands.coverage == "all" and lock is not None and entry is None,
            refusal=refused.get(name),
        )
        asked = entry or question.pattern or question.sparse or question.unlocked
        if asked or compared or nothing_asked:
            questions.append(question)
        elif excused:
            allowed.append(name)
    asked_of = {question.name for question in questions}.union(allowed)
    left_out = {name: reason for name, reason in left_out.items() if name not in asked_of}
    unread = {name: reason for name, reason in unread.items() if name not in asked_of}
    allowed += [name for name in unread if named(name, demands.allow_dense)]
    unread = {name: reason for name, reason in unread.items() if name not in allowed}
    if demands.coverage == "all":
        faults += [_unread(name, reason) for name, reason in sorted(unread.items())]
    return Plan(tuple(questions), tuple(faults), tuple(allowed), left_out, unread)


def _unlocked(artifact: Artifact, locked: Mapping[str, LockEntry]) -> dict[str, str]:
    """The matrices that a lock does not name, where nothing but the lock is asked."""
    shape = artifact.weights.shape
    matrices = (n for n in artifact.names if shape is None or is_matrix(shape(n)))
    return {name: "the lock does not name it" for name in sorted(matrices) if name not in locked}


def _unread(name: str, reason: str) -> Finding:
    return Finding(
        "unread-weight", f"{name}: {reason}, so it was not looked at; allow it to be dense, or remove it"
    )


def orientations(artifact: Artifact, lock: Lock | None) -> dict[str, bool]:
    """An artifact's sites and those of a lock of it: name -> stored (in, out)?

    What was traced is known better than what a lock says, and that better than what a name suggests.
    """
    traced = dict(artifact.weights.sites())
    said = {entry.name: entry.transposed for entry in lock.sites} if lock else {}
    return traced | said if artifact.weights.guessed else said | traced


def _joined(
    artifact: Artifact, lock: Lock | None, known: Mapping[str, bool], against: Artifact
) -> dict[str, bool]:
    """The sites of two artifacts, stored as this one stores them; as the other does where names only suggest."""
    theirs = orientations(against, against.lock)
    if not artifact.weights.guessed or against.weights.guessed:
        return theirs | dict(known)
    said = {entry.name: entry.transposed for entry in lock.sites} if lock else {}
    return dict(known) | theirs | said


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


def _required_beyond(targets: Iterable[str], names: Iterable[str], locked: Mapping[str, LockEntry]) -> bool:
    """Whether a required name may be that of a weight that the lock does not name. A bias is none."""
    targets = tuple(targets)
    return bool(targets) and any(
        name not in locked and not name.endswith(".bias") and named(name, targets) for name in names
    )


def _hits(target: str, known: Iterable[str], names: Iterable[str]) -> set[str]:
    """The sites of a target. One that is spelt out may also be a matrix that is no site by itself, as lm_head."""
    hits = {name for name in known if is_target(name, target)}
    if is_glob(target):
        return hits
    return hits | {name for name in names if is_target(name, target)}


def _matches_nothing(target: str, what: str, artifact: Artifact) -> Finding:
    return Finding(
        "missing-weight",
        f"no site of {artifact.path} is named {target!r}, {what}; it was renamed or left out, or the rule is old",
    )


_SHOWN = 3  # changed positions named in each direction


@dataclass(frozen=True)
class Other:
    """The artifact that masks are compared with, and whether it stores each weight (in, out)."""

    artifact: Artifact
    transposed: Mapping[str, bool]

    def mask(self, name: str) -> PackedMask:
        return self.artifact.weights.scan(name, self.transposed[name]).mask


def other_of(artifact: Artifact, questions: tuple[Question, ...]) -> Other:
    """Open another artifact for comparison; it may store a weight the other way round."""
    asked = {question.name: question.transposed for question in questions}
    stored = orientations(artifact, artifact.lock)
    if not artifact.weights.guessed:
        return Other(artifact, asked | stored)
    said = {entry.name: entry.transposed for entry in artifact.lock.sites} if artifact.lock else {}
    return Other(artifact, stored | asked | said)


@dataclass(frozen=True)
class _Change:
    """How a mask differs from another one: counts where they are known."""

    equal: bool
    lost: int | None
    new: int | None
    findings: tuple[Finding, ...] = ()


def look(artifact: Artifact, question: Question) -> Scan | None:
    """The scan of a site; None where the artifact has no such weight.

    Raises:
        FormatError: the weight cannot be read.
    """
    if question.refusal is not None:
        raise FormatError(
            f"{artifact.path}: {question.name}: {question.refusal}; it cannot be looked at. Verify the model "
            "in another form, or allow the site to be dense"
        )
    if question.name not in artifact.names:
        return None
    return artifact.weights.scan(question.name, question.transposed)


def judge(artifact: Artifact, question: Question, scan: Scan | None, other: Other | None) -> SiteVerdict:
    """Hold what `look` gave of a site to its question; the result holds no mask.

    Raises:
        FormatError: the weight of the other artifact cannot be read.
    """
    name, entry = question.name, question.entry
    pattern = question.pattern or (entry.parsed_pattern() if entry else None)
    wanted = None if pattern is None else str(pattern)
    if scan is None:
        absent = Finding("missing-weight", f"{artifact.path} has no such weight")
        return SiteVerdict(name, entry.shape if entry else (), pattern=wanted, findings=(absent,))
    mask = scan.mask
    changes: list[_Change] = []
    if other is not None:
        changes.append(_against(other, name, mask))
    if entry is not None:
        changes.append(_locked(entry, mask))
    violations, broken = _pattern(mask, pattern)
    findings = [
        *_non_finite(scan),
        *(finding for change in changes for finding in change.findings),
        *broken,
        *_dense(question, mask, pattern, violations),
    ]
    return SiteVerdict(
        name=name,
        shape=mask.shape,
        nnz=mask.nnz,
        sparsity=mask.sparsity,
        violations=violations,
        lost_zeros=changes[0].lost if changes else None,
        new_zeros=changes[0].new if changes else None,
        mask_equal=all(change.equal for change in changes) if changes else None,
        file=artifact.weights.file(name),
        pattern=wanted,
        findings=tuple(findings),
    )


def _non_finite(scan: Scan) -> list[Finding]:
    if scan.first_non_finite is None:
        return []
    place = _place(scan.first_non_finite)
    return [Finding("non-finite", f"holds {scan.non_finite} NaN or infinite values, first at {place}", place)]


def _against(other: Other, name: str, now: PackedMask) -> _Change:
    where = f"in {other.artifact.path}"
    if name not in other.artifact.names:
        absent = Finding("missing-weight", f"{other.artifact.path} has no such weight")
        return _Change(False, None, None, (absent,))
    then = other.mask(name)
    if then.shape != now.shape:
        message = f"has shape {list(now.shape)}, {list(then.shape)} {where}"
        return _Change(False, None, None, (Finding("mask-changed", message),))
    found = compare_masks(then, now, limit=_SHOWN)
    findings = [
        *_flips(found.first_lost, found.lost_zeros, f"zero {where}, non-zero here", now.shape),
        *_flips(found.first_new, found.new_zeros, f"non-zero {where}, zero here", now.shape),
    ]
    return _Change(found.equal, found.lost_zeros, found.new_zeros, tuple(findings))


def _locked(entry: LockEntry, mask: PackedMask) -> _Change:
    found = compare(entry, mask)
    lost, new = len(found.lost_zeros), len(found.new_zeros)
    findings = [
        *_flips(found.lost_zeros, lost, "zero in the lock, non-zero now", mask.shape),
        *_flips(found.new_zeros, new, "non-zero in the lock, zero now", mask.shape),
    ]
    if found.reason:
        findings.append(Finding("mask-changed", found.reason))
    return _Change(
        found.equal, lost if found.located else None, new if found.located else None, tuple(findings)
    )


def _flips(positions: list[Position], count: int, what: str, shape: tuple[int, ...]) -> list[Finding]:
    """The first positions, each a finding; the last one says how many there are in all."""
    places = [_place(_unfolded(position, shape)) for position in positions[:_SHOWN]]
    more = f" ({count} in all)" if count > len(places) else ""
    last = len(places) - 1
    return [
        Finding("mask-changed", f"{place}: {what}{more if index == last else ''}", place)
        for index, place in enumerate(places)
    ]


def _pattern(mask: PackedMask, pattern: Pattern | None) -> tuple[int, list[Finding]]:
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
    place = f"{where}row {row}, columns {first.col_start}-{first.col_end - 1}"
    return found.count, [Finding("pattern-broken", message, place)]


def _dense(question: Question, mask: PackedMask, pattern: Pattern | None, violations: int) -> list[Finding]:
    if not (question.sparse or question.unlocked):
        return []
    found = pattern if pattern is not None and not violations else detect_pattern(mask)
    look = f"is dense ({mask.sparsity:.2%} zeros)" if found is None else f"holds {found}"
    if question.unlocked:
        message = f"{look}, and the lock does not name it; lock it, or allow it to be dense"
        return [Finding("dense-site", message)]
    if found is not None:
        return []
    return [Finding("dense-site", f"{look}, and must be sparse; prune it, or allow it to be dense")]


def _unfolded(position: Position, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(row, column) of a flattened stack as (expert, row, column); of a matrix as it is."""
    row, column = position
    return (*divmod(row, shape[1]), column) if len(shape) == 3 else (row, column)


def _place(position: tuple[int, ...]) -> str:
    *expert, row, column = position
    return f"{f'expert {expert[0]}, ' if expert else ''}row {row}, column {column}"
