"""Which sites of an artifact are asked what: from its lock, its model and the demands of the caller."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spp_fx.ir.names import is_glob, is_target
from spp_fx.report.verdict import Finding
from spp_fx.sparsity import Lock, LockEntry, Pattern
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
    """

    name: str
    transposed: bool
    entry: LockEntry | None
    pattern: Pattern | None
    sparse: bool = False
    unlocked: bool = False


@dataclass(frozen=True)
class Plan:
    """What is asked of an artifact.

    Attributes:
        questions: by name, sorted.
        faults: names that were asked for and match nothing.
        allowed_dense: sites of which nothing is asked because they may be dense.
    """

    questions: tuple[Question, ...]
    faults: tuple[Finding, ...]
    allowed_dense: tuple[str, ...]


def plan(artifact: Artifact, lock: Lock | None, demands: Demands, *, compared: bool) -> Plan:
    """Turn a lock and demands into questions.

    A lock is asked of the sites that it names; a pattern, and another artifact (`compared`), of every site
    of the artifact. The model is traced to find those only where the lock's own do not answer.

    Raises:
        UsageError: the artifact's sites are needed and cannot be found.
    """
    locked = lock.by_name() if lock else {}
    known = {name: entry.transposed for name, entry in locked.items()}
    whole = compared or demands.pattern or demands.rules or demands.coverage == "all"
    if lock is None or whole or _required_beyond(demands.require, artifact.names, locked):
        known = dict(artifact.weights.sites()) | known
    faults: list[Finding] = []
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
        entry, excused = locked.get(name), named(name, demands.allow_dense)
        question = Question(
            name,
            known.get(name, False),
            entry,
            pattern=None if excused else demands.pattern_of(name),
            sparse=not excused and (name in required or all_sparse),
            unlocked=not excused and demands.coverage == "all" and lock is not None and entry is None,
        )
        asked = entry or question.pattern or question.sparse or question.unlocked
        if asked or compared or nothing_asked:
            questions.append(question)
        elif excused:
            allowed.append(name)
    return Plan(tuple(questions), tuple(faults), tuple(allowed))


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
