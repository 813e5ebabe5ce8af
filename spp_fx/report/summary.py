"""Verdicts as a Markdown page: what GitHub shows as the summary of a step."""

import re
from collections.abc import Iterator, Sequence

from spp_fx.errors import escaped
from spp_fx.report.place import Root
from spp_fx.report.text import SHOWN, conclusion
from spp_fx.report.verdict import Verified

_PLAIN = re.compile(r"[^0-9A-Za-z .,:;/()-]")


def summary(verdicts: Sequence[Verified], root: Root) -> str:
    """A heading, a table of artifacts, and a table of failures for each that does not hold."""
    return "\n".join(_lines(verdicts, root)) + "\n"


def _lines(verdicts: Sequence[Verified], root: Root) -> Iterator[str]:
    bad = sum(not verdict.ok for verdict in verdicts)
    yield f"## spp-fx verify: {f'{bad} of {len(verdicts)} artifacts do not hold' if bad else 'all hold'}"
    yield ""
    yield "| | artifact | kind | sites | failed | zeros |"
    yield "|---|---|---|---:|---:|---:|"
    for verdict in verdicts:
        mark = "ok" if verdict.ok else "**not ok**"
        numbers = f"{len(verdict.sites)} | {len(verdict.failed)} | {verdict.sparsity:.2%}"
        yield f"| {mark} | {_cell(root.shown(verdict.path))} | {_cell(verdict.kind)} | {numbers} |"
    for verdict in verdicts:
        if not verdict.ok:
            yield from _failures(verdict)
    yield ""


def _failures(verdict: Verified) -> Iterator[str]:
    yield ""
    yield f"### {_cell(conclusion(verdict))}"
    yield ""
    yield "| what | why |"
    yield "|---|---|"
    rows = [(verdict.kind, problem) for problem in verdict.problems]
    rows += [(site.name, site.reason or "") for site in verdict.failed]
    for what, why in rows[:SHOWN]:
        yield f"| {_cell(what)} | {_cell(why)} |"
    if len(rows) > SHOWN:
        yield f"| ... | and {len(rows) - SHOWN} more; `--json` lists all |"


def _cell(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text: all else is written as character references."""
    return _PLAIN.sub(lambda match: f"&#{ord(match[0])};", escaped(text))
