"""What verify found, as data and as text for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from spp_fx.console import grouped
from spp_fx.errors import escaped

RULES = {
    "mask-changed": "A mask differs from that of the lock or of the other artifact.",
    "pattern-broken": "A weight has more non-zeros than its sparsity pattern allows.",
    "dense-site": "A weight that must be sparse is dense, or the lock does not name it.",
    "missing-weight": "A required weight is missing.",
    "unread-weight": "A weight was not checked, because its role or its form is unknown.",
    "non-finite": "A weight holds NaN or infinity.",
    "artifact-damaged": "A file cannot be read, is not what it claims to be, or must not be released.",
}
"""The kinds of findings. Their names do not change from release to release."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold.

    Attributes:
        rule: a key of `RULES`.
        message: what is wrong, with row and column where there is one, and how to fix it.
        position: 'row 17, column 66' where one element or group is at fault.
    """

    rule: str
    message: str
    position: str | None = None


@dataclass(frozen=True)
class SiteVerdict:
    """What verify found of one site.

    Attributes:
        violations: groups (or missing zeros) that break the pattern.
        lost_zeros, new_zeros: positions that changed; None where only a digest is known.
        mask_equal: None where there was nothing to compare with.
        file: name of the file that holds it; empty where there is none.
        pattern: that it was checked for; None without one.
        findings: why it is not ok; none where it is.
        origin: a sentence on the step that wrote the file, where the artifact has a history.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int = 0
    sparsity: float = 0.0
    violations: int = 0
    lost_zeros: int | None = None
    new_zeros: int | None = None
    mask_equal: bool | None = None
    file: str = ""
    pattern: str | None = None
    findings: tuple[Finding, ...] = ()
    origin: str | None = None

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def numel(self) -> int:
        """Elements of the weight; 0 where its shape is unknown."""
        return prod(self.shape) if self.shape else 0

    @property
    def reason(self) -> str | None:
        """Why it is not ok, in one line: the file, all findings, the origin."""
        if not self.findings:
            return None
        messages = [finding.message for finding in self.findings]
        sentence = "; ".join(messages + ([self.origin] if self.origin else []))
        return f"{self.file}: {sentence}" if self.file else sentence

    def to_json(self) -> dict[str, Any]:
        fields = ("nnz", "sparsity", "violations", "lost_zeros", "new_zeros", "mask_equal", "ok", "reason")
        return {"name": self.name, "shape": list(self.shape)} | {key: getattr(self, key) for key in fields}


@dataclass(frozen=True)
class Verified:
    """The verdict on an artifact.

    Attributes:
        path: the artifact, as it was given.
        kind: model, adapter, safetensors, onnx, cusparselt, ..., or `unknown`.
        sites: those that were checked, by name.
        faults: why the artifact must not be released, whatever its sites hold.
        allowed_dense: sites that were not checked because they may be dense.
        left_out: matrices that are not sites because of what the model does with them, each with that reason.
        unread: all other matrices that were not checked, each with the reason.
        notes: what is odd about its files and changes nothing.
        error: why no site could be checked; the first fault has its message.
    """

    path: Path
    kind: str
    sites: tuple[SiteVerdict, ...]
    faults: tuple[Finding, ...] = ()
    allowed_dense: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    unread: Mapping[str, str] = field(default_factory=dict[str, str])
    error: Exception | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.faults and all(site.ok for site in self.sites)

    @property
    def problems(self) -> tuple[str, ...]:
        """The faults, in words."""
        return tuple(fault.message for fault in self.faults)

    @property
    def pattern(self) -> str | None:
        """The pattern that every site was checked for; None where they differ or there was none."""
        patterns = {site.pattern for site in self.sites}
        return patterns.pop() if len(patterns) == 1 else None

    @property
    def failed(self) -> tuple[SiteVerdict, ...]:
        return tuple(site for site in self.sites if not site.ok)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every failure in words: the problems of the artifact, then site by site."""
        return (*self.problems, *(f"{site.name}: {site.reason}" for site in self.failed))

    @property
    def sparsity(self) -> float:
        """Share of zeros over all sites."""
        total = sum(site.numel for site in self.sites)
        return 1 - sum(site.nnz for site in self.sites) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        failed = len(self.failed)
        data: dict[str, Any] = {
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
            "left_out": dict(self.left_out),
            "unread": dict(self.unread),
        }
        if self.allowed_dense:
            data["allowed_dense"] = list(self.allowed_dense)
        if self.notes:
            data["notes"] = list(self.notes)
        return data


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one run: on the artifacts that a policy lists, or on a single one."""

    each: Sequence[Verified]
    listed: bool

    @property
    def ok(self) -> bool:
        return all(verdict.ok for verdict in self.each)

    def to_json(self) -> dict[str, Any]:
        if not self.listed:
            return self.each[0].to_json()
        return {
            "ok": self.ok,
            "artifacts": [{"path": str(verdict.path)} | verdict.to_json() for verdict in self.each],
        }

    def lines(self) -> Iterator[str]:
        """Nothing for a single artifact that cannot be opened: that is an error, not a verdict."""
        for verdict in self.each:
            if self.listed or verdict.error is None:
                yield from lines(verdict, one_of_many=len(self.each) > 1)


def findings_of(verdict: Verified) -> list[tuple[SiteVerdict | None, Finding]]:
    """Every finding with its site, None for those of the artifact, in the order of the report."""
    whole: list[tuple[SiteVerdict | None, Finding]] = [(None, fault) for fault in verdict.faults]
    return whole + [(site, finding) for site in verdict.sites for finding in site.findings]


SHOWN = 20
"""How many problems, and how many failing sites, are listed; the rest are counted."""


def lines(verdict: Verified, *, one_of_many: bool = False) -> Iterator[str]:
    """The first failures, then the verdict; `one_of_many` puts the artifact's path before each failure."""
    fail = f"FAIL {escaped(str(verdict.path))}:" if one_of_many else "FAIL"
    for problem in verdict.problems[:SHOWN]:
        yield f"{fail} {verdict.kind}: {escaped(problem)}"
    if len(verdict.problems) > SHOWN:
        yield f"... and {len(verdict.problems) - SHOWN} more problems; --json lists all"
    failed = verdict.failed
    for site in failed[:SHOWN]:
        yield f"{fail} {escaped(site.name)}: {escaped(site.reason or '')}"
    if len(failed) > SHOWN:
        yield f"... and {len(failed) - SHOWN} more; --json lists all"
    yield conclusion(verdict)
    if verdict.ok:
        for what, reasons in (("left out", verdict.left_out), ("not checked", verdict.unread)):
            yield from (f"  {what}: {line}" for line in grouped(reasons))


def conclusion(verdict: Verified) -> str:
    """The verdict in one line."""
    what = f"{verdict.kind} {escaped(str(verdict.path))}"
    if not verdict.ok:
        count = len(verdict.problems)
        whole = f", {count} other problem{'s' if count > 1 else ''}" if count else ""
        return f"not ok: {what}: {len(verdict.failed)} of {len(verdict.sites)} sites fail{whole}"
    held = f"hold {verdict.pattern}" if verdict.pattern else "pass"
    equal = sum(site.mask_equal is True for site in verdict.sites)
    masks = f", {equal} masks equal" if equal else ""
    dense = f", {len(verdict.allowed_dense)} allowed to be dense" if verdict.allowed_dense else ""
    count = len(verdict.unread)
    unread = f", {count} other weight{'s' if count > 1 else ''} not checked" if count else ""
    return f"ok: {what}: all {len(verdict.sites)} sites {held}{masks}{dense}{unread}"
