"""Verdicts as GitHub workflow commands: failures become annotations of the run."""

from collections.abc import Iterator, Sequence

from spp_fx.errors import escaped
from spp_fx.report.place import Root, file_of
from spp_fx.report.verdict import SiteVerdict, Verified

MAX_ANNOTATIONS = 10
"""GitHub shows no more errors than these of one step."""


def annotations(verdicts: Sequence[Verified], root: Root) -> Iterator[str]:
    """One `::error` line for each problem and each site that does not hold; the last one counts the rest."""
    failures = [failure for verdict in verdicts for failure in _failures(verdict)]
    shown = len(failures) if len(failures) <= MAX_ANNOTATIONS else MAX_ANNOTATIONS - 1
    for verdict, site, reason in failures[:shown]:
        title = verdict.kind if site is None else site.name
        file = root.relative(file_of(verdict, site))
        where = "" if site is None or file is None else f",file={_property(file)}"
        yield f"::error title={_property(title)}{where}::{_escape(reason)}"
    if shown < len(failures):
        yield f"::error title=spp-fx verify::and {len(failures) - shown} more failures; the log or --json has all"


def _failures(verdict: Verified) -> Iterator[tuple[Verified, SiteVerdict | None, str]]:
    for problem in verdict.problems:
        yield verdict, None, problem
    for site in verdict.failed:
        yield verdict, site, site.reason or ""


def _escape(text: str) -> str:
    return escaped(text).replace("%", "%25")


def _property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
