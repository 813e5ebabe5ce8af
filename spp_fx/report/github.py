"""A verdict as GitHub workflow commands: failures become annotations of the run."""

from collections.abc import Iterator, Mapping
from typing import Any

from spp_fx.report.text import printable


def annotations(verdict: Mapping[str, Any]) -> Iterator[str]:
    """One `::error` line for each problem of the artifact and each site that does not hold."""
    for problem in verdict["problems"]:
        yield f"::error title={_property(verdict['kind'])}::{_escape(problem)}"
    for site in verdict["sites"]:
        if not site["ok"]:
            yield f"::error title={_property(site['name'])}::{_escape(site['reason'])}"


def _escape(text: str) -> str:
    return printable(text).replace("%", "%25")


def _property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")
