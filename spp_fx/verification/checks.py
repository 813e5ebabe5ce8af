"""Which sites are checked for what, and the check of one site: its lock entry, a pattern, another artifact."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spp_fx.errors import FormatError, PatternError
from spp_fx.sparsity.lock import Lock, LockEntry, MaskDifference, compare, compare_masks
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern, detect_pattern, scan_bits
from spp_fx.sparsity.weights import Sites, Weights, is_glob, is_matrix, is_target, without
from spp_fx.verification.artifact import Artifact
from spp_fx.verification.policy import Requirements, named
from spp_fx.verification.verdict import Finding, SiteVerdict

_SHOWN = 3  # changed positions named in each direction


@dataclass(frozen=True)
class SiteCheck:
    """What is checked of one site.

    Attributes:
        transposed: it is stored (in, out).
        entry: its entry in the lock.
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

    def verdict(self, *findings: Finding) -> SiteVerdict:
        """The verdict on a site that could not be scanned."""
        shape, pattern = self.entry.shape if self.entry else (), self.expected_pattern
        return SiteVerdict(self.name, shape, pattern=pattern and str(pattern), findings=findings)


@dataclass(frozen=True)
class Plan:
    """What is checked of an artifact.

    Attributes:
        checks: by name, sorted.
        faults: names in the requirements that match nothing; contradictions of lock and model.
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

    A lock is checked for the sites that it names; a pattern for every site of the artifact, also one that is not
    stored; another artifact for the sites of both, unless this one is only a part of a model. The model is traced
    to find the sites only where those of the lock do not suffice; the traced model then decides how they are stored.

    Raises:
        UsageError: the artifact's sites are needed and cannot be found.
    """
    locked = lock.by_name() if lock else {}
    every_site = (
        lock is None or against is not None or _needs_every_site(requirements, artifact.weights, locked)
    )
    sites = artifact.weights.sites if every_site else _locked_sites(artifact.weights, locked)
    known = dict.fromkeys(sites.unreadable, False) | _orientations(sites, lock, artifact.weights.guessed)
    faults = _turned(artifact, locked, known)
    by_name_only: set[str] = set()
    there: Mapping[str, bool] = {}
    if against is not None:
        others = against.weights
        theirs = _orientations(others.sites, against.lock, others.guessed)
        there = _locked_orientations(against.lock) if others.guessed else theirs
        if not artifact.part:
            if others.guessed:  # what is a site by its name alone must be equal, and need not be sparse
                by_name_only = theirs.keys() - known.keys()
            if (
                artifact.weights.guessed and not others.guessed
            ):  # the other one knows how its sites are stored
                known = known | theirs | _locked_orientations(lock)
            else:
                known = theirs | known
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
            unreadable=sites.unreadable.get(name),
            transposed_there=there.get(name, known.get(name, False)),
        )
        checked = entry or check.pattern or check.sparse or check.unlocked
        if checked or against is not None or nothing_required:
            checks.append(check)
        elif excused:
            allowed.append(name)
    considered = {check.name for check in checks}.union(allowed)
    unread = without(sites.unread, considered)
    allowed += [name for name in unread if named(name, requirements.allow_dense)]
    unread = without(unread, allowed)
    if everything:
        faults += [
            Finding(
                "unread-weight",
                f"{name}: {reason}, so it was not checked; remove it, or allow it to be dense",
            )
            for name, reason in sorted(unread.items())
        ]
    return Plan(tuple(checks), tuple(faults), tuple(allowed), without(sites.left_out, considered), unread)


def _needs_every_site(requirements: Requirements, weights: Weights, locked: Mapping[str, LockEntry]) -> bool:
    """Whether more is required than the lock's own sites. A bias is not a weight."""
    return (
        bool(requirements.pattern or requirements.rules)
        or requirements.coverage == "all"
        or any(
            name not in locked and not name.endswith(".bias") and named(name, requirements.require)
            for name in weights.names
        )
    )


def _locked_sites(weights: Weights, locked: Mapping[str, LockEntry]) -> Sites:
    """The sites of a lock; every other matrix is unread."""
    shape = weights.shape
    matrices = (name for name in weights.names if shape is None or is_matrix(shape(name)))
    unread = {name: "the lock does not name it" for name in sorted(matrices) if name not in locked}
    return Sites({name: entry.transposed for name, entry in locked.items()}, unread=unread)


def _locked_orientations(lock: Lock | None) -> dict[str, bool]:
    return {entry.name: entry.transposed for entry in lock.sites} if lock else {}


def _orientations(sites: Sites, lock: Lock | None, guessed: bool) -> dict[str, bool]:
    """Sites and those of a lock: name -> stored (in, out)?

    Tracing is more reliable than a lock, and a lock than a name (`guessed`).
    """
    found, locked = dict(sites.transposed), _locked_orientations(lock)
    return found | locked if guessed else locked | found


def _turned(artifact: Artifact, locked: Mapping[str, LockEntry], known: Mapping[str, bool]) -> list[Finding]:
    """A finding if the lock has another orientation of sites than the model."""
    turned = [name for name, entry in locked.items() if known[name] != entry.transposed]
    if not turned:
        return []
    model, locks = ("(in, out)", "(out, in)") if known[turned[0]] else ("(out, in)", "(in, out)")
    more = f", as {len(turned) - 1} more sites" if len(turned) > 1 else ""
    message = (
        f"the lock has {turned[0]} stored {locks}{more}, the model stores it {model}; "
        f"make the lock of {artifact.path} again with spp-fx lock"
    )
    return [Finding("artifact-damaged", message)]


def _required(
    requirements: Requirements, known: Mapping[str, bool], artifact: Artifact, faults: list[Finding]
) -> set[str]:
    """The sites that must be sparse. Each name in the requirements that matches nothing is a fault.

    A name without a glob may also be that of a matrix that is not a site by itself, such as lm_head.
    """

    def matches_nothing(target: str, what: str) -> Finding:
        message = (
            f"no site of {artifact.path} is named {target!r}, which must be {what}; "
            "correct the name, or restore the site"
        )
        return Finding("missing-weight", message)

    required: set[str] = set()
    for target in requirements.require:
        candidates = known.keys() if is_glob(target) else known.keys() | artifact.weights.names
        hits = {name for name in candidates if is_target(name, target)}
        required |= hits
        if not hits:
            faults.append(matches_nothing(target, "sparse"))
    for rule in requirements.rules:
        for target in rule.sites:
            if not any(is_target(name, target) for name in known):
                faults.append(matches_nothing(target, str(rule.pattern)))
    return required


def check_site(artifact: Artifact, check: SiteCheck, against: Artifact | None) -> SiteVerdict:
    """Scan a site and compare it with what it should be; the result holds no mask.

    Raises:
        FormatError: the weight cannot be read, here or in the other artifact.
    """
    name, pattern, weights = check.name, check.expected_pattern, artifact.weights
    if check.unreadable is not None:
        raise FormatError(
            f"{artifact.path}: {name}: {check.unreadable}, so its zeros cannot be checked; verify the model in "
            "another form, or allow the site to be dense"
        )
    if name not in weights.names:
        return check.verdict(Finding("missing-weight", f"{artifact.path} has no such weight"))
    scan = weights.scan(name, check.transposed)
    mask, findings = scan.mask, list[Finding]()
    if scan.position is not None:
        message = f"holds {scan.non_finite} NaN or infinite values, first at {scan.position}"
        findings.append(Finding("non-finite", message, scan.position))
    differences: list[MaskDifference] = []
    if against is not None:
        other = _other_mask(against, check, mask)
        if isinstance(other, Finding):
            differences.append(MaskDifference(None, None))
            findings.append(other)
        else:
            differences.append(compare_masks(other, mask, limit=_SHOWN))
            findings += _changes(differences[-1], mask, f"in {against.path}", "here")
    if check.entry is not None:
        differences.append(compare(check.entry, mask))
        findings += _changes(differences[-1], mask, "in the lock", "now")
    violations, broken = _broken_pattern(mask, pattern)
    findings += broken
    if check.sparse or check.unlocked:
        findings += _dense(check, mask, None if violations else pattern)
    return replace(
        check.verdict(*findings),
        shape=mask.shape,
        nnz=mask.nnz,
        sparsity=mask.sparsity,
        violations=violations,
        lost_zeros=differences[0].lost_zeros if differences else None,
        new_zeros=differences[0].new_zeros if differences else None,
        mask_equal=all(difference.equal for difference in differences) if differences else None,
        file=weights.file(name),
    )


def _other_mask(against: Artifact, check: SiteCheck, mask: PackedMask) -> PackedMask | Finding:
    """The mask of a site in another artifact, or why it cannot be compared."""
    if check.name not in against.weights.names:
        return Finding("missing-weight", f"{against.path} has no such weight")
    other = against.weights.scan(check.name, check.transposed_there).mask
    if other.shape != mask.shape:
        message = f"has shape {list(mask.shape)}, {list(other.shape)} in {against.path}"
        return Finding("mask-changed", message)
    return other


def _changes(difference: MaskDifference, mask: PackedMask, then: str, now: str) -> list[Finding]:
    """The first changed positions of each direction, each a finding; the last one has the count of all."""
    if difference.reason:
        return [Finding("mask-changed", difference.reason)]
    findings: list[Finding] = []
    for before, after, positions, count in (
        ("zero", "non-zero", difference.first_lost, difference.lost_zeros),
        ("non-zero", "zero", difference.first_new, difference.new_zeros),
    ):
        shown = [f"{mask.row_name(row)}, column {column}" for row, column in positions[:_SHOWN]]
        for number, position in enumerate(shown, 1):
            more = f" ({count} in all)" if number == len(shown) != count else ""
            message = f"{position}: {before} {then}, {after} {now}{more}"
            findings.append(Finding("mask-changed", message, position))
    return findings


def _broken_pattern(mask: PackedMask, pattern: Pattern | None) -> tuple[int, list[Finding]]:
    """How many groups (or missing zeros) break a pattern, and the first of them."""
    if pattern is None:
        return 0, []
    try:
        found = scan_bits(mask, pattern)
    except PatternError as error:
        return 1, [Finding("pattern-broken", str(error))]
    if not found.count:
        return 0, []
    return found.count, [Finding("pattern-broken", found.describe(pattern), found.position)]


def _dense(check: SiteCheck, mask: PackedMask, pattern: Pattern | None) -> list[Finding]:
    """That a site is dense, or not locked; `pattern` is one that it is known to hold."""
    found = pattern or detect_pattern(mask)
    density = f"is dense ({mask.sparsity:.2%} zeros)" if found is None else f"holds {found}"
    if check.unlocked:
        message = f"{density}, and the lock does not name it; lock it, or allow it to be dense"
    elif found is None:
        message = f"{density}, and must be sparse; prune it, or allow it to be dense"
    else:
        return []
    return [Finding("dense-site", message)]
