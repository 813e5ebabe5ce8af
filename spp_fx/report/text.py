"""A verdict for a terminal."""

from collections.abc import Iterator, Mapping

from spp_fx.errors import escaped
from spp_fx.report.verdict import Verified

SHOWN = 20
"""Problems and failing sites told in full; the rest are counted."""


def lines(verdict: Verified, *, one_of_many: bool = False) -> Iterator[str]:
    """Each failure, the first ones in full, then the verdict; of many, each says which artifact it is of."""
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
        for what, reasons in (("left out", verdict.left_out), ("not looked at", verdict.unread)):
            yield from (f"  {what}: {line}" for line in grouped(reasons))


def grouped(reasons: Mapping[str, str]) -> Iterator[str]:
    """Names with their reasons, a line a reason: the first name, and how many more have the same."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, group in names.items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"{escaped(group[0])}{more}: {escaped(reason)}"


def conclusion(verdict: Verified) -> str:
    """The verdict in one line."""
    what = f"{verdict.kind} {escaped(str(verdict.path))}"
    if not verdict.ok:
        count = len(verdict.problems)
        whole = f", {count} problem{'s' if count > 1 else ''} of the whole" if count else ""
        return f"not ok: {what}: {len(verdict.failed)} of {len(verdict.sites)} sites fail{whole}"
    held = f"hold {verdict.pattern}" if verdict.pattern else "are as they should be"
    equal = sum(site.mask_equal is True for site in verdict.sites)
    masks = f", {equal} masks equal" if equal else ""
    dense = f", {len(verdict.allowed_dense)} allowed to be dense" if verdict.allowed_dense else ""
    count = len(verdict.unread)
    unread = f", {count} other weight{'s' if count > 1 else ''} not looked at" if count else ""
    return f"ok: {what}: all {len(verdict.sites)} sites {held}{masks}{dense}{unread}"
