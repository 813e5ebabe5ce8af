"""Which sites of an artifact are asked what: from its lock, its model and the demands of the caller."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spp_fx.ir.names import is_glob, is_target
from spp_fx.report.verdict import Finding
from spp_fx.sparsity import Lock, LockEntry, Pattern, is_matrix
from spp_fx.workflows.artifact import Artifact
from spp_fx.workflows.demands import Demands, named


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
