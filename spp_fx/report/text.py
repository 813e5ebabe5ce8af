"""A verdict for a terminal."""

from collections.abc import Iterator

from spp_fx.errors import escaped
from spp_fx.report.verdict import Verified

SHOWN = 20
"""Failing sites told in full; the rest are counted."""


def lines(verdict: Verified, *, one_of_many: bool = False) -> Iterator[str]:
    """Each failure, the first ones in full, then the verdict; of many, each says which artifact it is of."""
    fail = f"FAIL {escaped(str(verdict.path))}:" if one_of_many else "FAIL"
    for problem in verdict.problems:
        yield f"{fail} {verdict.kind}: {escaped(problem)}"
    failed = verdict.failed
    for site in failed[:SHOWN]:
        yield f"{fail} {escaped(site.name)}: {escaped(site.reason or '')}"
    if len(failed) > SHOWN:
        yield f"... and {len(failed) - SHOWN} more; --json lists all"
    yield conclusion(verdict)


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
    return f"ok: {what}: all {len(verdict.sites)} sites {held}{masks}{dense}"
