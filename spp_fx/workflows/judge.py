"""One site held to everything that is asked of it: its lock, a pattern, another artifact, being sparse at all."""

from collections.abc import Mapping
from dataclasses import dataclass

from spp_fx.errors import FormatError, PatternError
from spp_fx.report.verdict import Finding, SiteVerdict
from spp_fx.sparsity import (
    LockEntry,
    PackedMask,
    Pattern,
    Position,
    Scan,
    compare,
    compare_masks,
    detect_pattern,
    scan_bits,
)
from spp_fx.workflows.artifact import Artifact
from spp_fx.workflows.coverage import Question, orientations

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
