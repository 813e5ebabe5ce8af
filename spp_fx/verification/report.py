"""Reports of verify for other tools: JUnit, SARIF, GitHub annotations and step summaries.

SARIF: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html. Weights have no lines, so a result names the
file, and the tensor, row and column as logical locations.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from spp_fx.errors import SppFxError, UsageError, escaped
from spp_fx.storage.output import atomic_file
from spp_fx.verification.verdict import RULES, SHOWN, Finding, SiteVerdict, Verified, conclusion, findings_of
from spp_fx.version import VERSION


@dataclass(frozen=True)
class Root:
    """The folder that paths in reports are relative to."""

    path: Path

    @classmethod
    def current(cls) -> "Root":
        """The checkout in a GitHub workflow, else the current folder."""
        return cls(Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve())

    def relative(self, path: Path) -> str | None:
        """A path below the root with '/' between its parts, None for one outside."""
        absolute = Path(os.path.abspath(path))
        for form in (absolute, absolute.resolve()):
            if form.is_relative_to(self.path):
                return form.relative_to(self.path).as_posix()
        return None

    def shown(self, path: Path) -> str:
        """As `relative`; the absolute path for one outside."""
        return self.relative(path) or Path(os.path.abspath(path)).as_posix()

    def uri(self, path: Path) -> str:
        """As `relative`, as a URI reference; a file URI for one outside."""
        inside = self.relative(path)
        return (
            quote(os.fsencode(inside), safe="/")
            if inside is not None
            else Path(os.path.abspath(path)).as_uri()
        )


def file_of(verdict: Verified, site: SiteVerdict | None) -> Path:
    """The file that holds a site if it is in the artifact's folder, else the artifact itself."""
    if site is None or not site.file or not verdict.path.is_dir():
        return verdict.path
    file = verdict.path / site.file
    return file if file.is_file() else verdict.path


def write_report(target: Path, text: str) -> None:
    """Write or replace a report; SppFxError if that fails, and an old report is then unchanged."""
    if os.path.lexists(target) and not target.is_dir() and not target.is_file():
        raise _unwritten(target, "the path is a pipe, a device or a dangling link")
    try:
        with atomic_file(target, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except SppFxError as error:
        raise _unwritten(target, str(error)) from error


def append_report(target: Path, text: str) -> None:
    """Append to a file to which others write as well, such as GitHub's step summary; SppFxError if that fails."""
    try:
        with target.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise _unwritten(target, error.strerror or str(error)) from error


def write_reports(
    verdicts: Sequence[Verified], root: Root, *, junit_to: Path | None, sarif_to: Path | None,
    summary_to: str | None,
) -> None:  # fmt: skip
    """Write the reports whose files are given; raises as `write_all`."""
    writes: list[Callable[[], None]] = []
    if junit_to:
        writes.append(partial(write_report, junit_to, junit(verdicts, root)))
    if sarif_to:
        writes.append(partial(write_report, sarif_to, sarif(verdicts, root)))
    if summary_to:
        writes.append(partial(append_report, Path(summary_to), summary(verdicts, root)))
    write_all(writes)


def write_all(writes: Iterable[Callable[[], None]]) -> None:
    """Write every report; after the last one, raise the errors of those that could not be written."""
    failures: list[SppFxError] = []
    for write in writes:
        try:
            write()
        except SppFxError as error:
            failures.append(error)
    if failures:
        raise SppFxError("; ".join(map(str, failures))) from failures[0]


def _unwritten(target: Path, why: str) -> SppFxError:
    return SppFxError(f"{target}: the report was not written: {why}")


def check_targets(
    reports: Mapping[str, tuple[Path, str]], artifacts: Iterable[Path], files: Mapping[str, Path]
) -> None:
    """Raise if a report would overwrite an input.

    Args:
        reports: by option, the file to write and the suffix of such reports. In the folder of an artifact, which
            may be the current folder, a report must have that suffix: no file of an artifact has it.
        artifacts: files and folders that are verified or compared with.
        files: other files that are read, by description.

    Raises:
        UsageError: names the option and what it would overwrite.
    """
    written: dict[Path, str] = {}
    for option, (target, suffix) in reports.items():
        for form in _forms(target):
            if (other := written.setdefault(form, option)) != option:
                raise UsageError(
                    f"{option} {target}: is the file of {other} as well; give each report a file of its own"
                )
            for what, file in files.items():
                if form in _forms(file):
                    raise UsageError(f"{option} {target}: is the {what}; give another file")
            for artifact in artifacts:
                if form in _forms(artifact) or (target.suffix != suffix and _would_be_part(form, artifact)):
                    raise UsageError(
                        f"{option} {target}: is or would become a part of the artifact {artifact}; "
                        f"give a file outside of it, or one named *{suffix}"
                    )


def _would_be_part(report: Path, artifact: Path) -> bool:
    """Whether a report is inside an artifact's folder, or would replace a file beside a single-file artifact."""
    if artifact.is_dir():
        return any(report.is_relative_to(form) for form in _forms(artifact))
    return os.path.lexists(report) and any(report.parent == form.parent for form in _forms(artifact))


def _forms(path: Path) -> Sequence[Path]:
    """A path as it was given, and with links resolved."""
    return tuple(dict.fromkeys((Path(os.path.abspath(path)), path.resolve())))


_PLAIN = re.compile(r"[^0-9A-Za-z .,:;/()-]")


def summary(verdicts: Sequence[Verified], root: Root) -> str:
    """A Markdown page: a table of artifacts, and a table of failures for each that does not pass."""
    return "\n".join(_lines(verdicts, root)) + "\n"


def _lines(verdicts: Sequence[Verified], root: Root) -> Iterator[str]:
    bad = sum(not verdict.ok for verdict in verdicts)
    yield f"## spp-fx verify: {f'{bad} of {len(verdicts)} artifacts failed' if bad else 'all artifacts passed'}"
    yield ""
    yield "| | artifact | kind | sites | failed | zeros |"
    yield "|---|---|---|---:|---:|---:|"
    for verdict in verdicts:
        mark = "ok" if verdict.ok else "**not ok**"
        numbers = f"{len(verdict.sites)} | {len(verdict.failed)} | {verdict.sparsity:.2%}"
        yield f"| {mark} | {_cell(root.shown(verdict.path))} | {_cell(verdict.kind)} | {numbers} |"
    for verdict in verdicts:
        if not verdict.ok:
            yield from ("", f"### {_cell(conclusion(verdict))}", "", "| what | why |", "|---|---|")
            failures = _failures(verdict)
            for site, reason in failures[:SHOWN]:
                yield f"| {_cell(_subject(verdict, site))} | {_cell(reason)} |"
            if len(failures) > SHOWN:
                yield f"| ... | and {len(failures) - SHOWN} more; `--json` lists all |"
    yield ""


def _failures(verdict: Verified) -> list[tuple[SiteVerdict | None, str]]:
    """The problems of the artifact, then its failed sites with their reasons."""
    problems: list[tuple[SiteVerdict | None, str]] = [(None, problem) for problem in verdict.problems]
    return problems + [(site, site.reason or "") for site in verdict.failed]


def _subject(verdict: Verified, site: SiteVerdict | None) -> str:
    return verdict.kind if site is None else site.name


def _cell(text: str) -> str:
    """Text that Markdown and HTML show as it is: special characters become character references."""
    return _PLAIN.sub(lambda match: f"&#{ord(match[0])};", escaped(text))


MAX_ANNOTATIONS = 10
"""GitHub shows no more errors than this of one step."""


def annotations(verdicts: Sequence[Verified], root: Root) -> Iterator[str]:
    """One `::error` line for each problem and each failed site; the last one counts the rest."""
    failures = [(verdict, *failure) for verdict in verdicts for failure in _failures(verdict)]
    shown = len(failures) if len(failures) <= MAX_ANNOTATIONS else MAX_ANNOTATIONS - 1
    for verdict, site, reason in failures[:shown]:
        file = root.relative(file_of(verdict, site))
        where = "" if site is None or file is None else f",file={_property(file)}"
        yield f"::error title={_property(_subject(verdict, site))}{where}::{_escape(reason)}"
    if shown < len(failures):
        yield f"::error title=spp-fx verify::and {len(failures) - shown} more failures; see the log or --json"


def _escape(text: str) -> str:
    return escaped(text).replace("%", "%25")


def _property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")


_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>'


def junit(verdicts: Sequence[Verified], root: Root) -> str:
    """The report as XML text; an artifact that cannot be read is a suite with one failing case."""
    suites = [_suite(verdict, root) for verdict in verdicts]
    whole = ElementTree.Element("testsuites", name="spp-fx verify")
    for count in ("tests", "failures", "errors", "skipped"):
        whole.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    whole.extend(suites)
    ElementTree.indent(whole)
    return f"{_DECLARATION}\n{ElementTree.tostring(whole, encoding='unicode')}\n"


def _suite(verdict: Verified, root: Root) -> ElementTree.Element:
    name = escaped(root.shown(verdict.path))
    suite = ElementTree.Element(
        "testsuite",
        name=f"spp-fx verify {name}",
        tests=str(len(verdict.sites) + len(verdict.faults)),
        failures=str(len(verdict.failed) + len(verdict.faults)),
        errors="0",
        skipped="0",
    )
    for number, fault in enumerate(verdict.faults, 1):
        case = f"{verdict.kind}: problem {number}" if len(verdict.faults) > 1 else verdict.kind
        _case(suite, name, case, fault.message, (fault,))
    for site in verdict.sites:
        _case(suite, name, site.name, site.reason, site.findings)
    return suite


def _case(
    suite: ElementTree.Element, artifact: str, name: str, reason: str | None, findings: Sequence[Finding]
) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=artifact, name=escaped(name))
    if findings:
        kind = findings[0].rule
        failure = ElementTree.SubElement(case, "failure", message=escaped(reason or ""), type=kind)
        failure.text = "\n".join(escaped(finding.message) for finding in findings)


_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_FINGERPRINT = "sppFxFinding/v1"
_SOURCE_ROOT = "%SRCROOT%"


def sarif(verdicts: Sequence[Verified], root: Root) -> str:
    """The log as JSON text: one run, one result for each finding."""
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "spp-fx",
                "version": VERSION,
                "semanticVersion": VERSION,
                "rules": [
                    {
                        "id": rule,
                        "shortDescription": {"text": text},
                        "defaultConfiguration": {"level": "error"},
                    }
                    for rule, text in RULES.items()
                ],
            }
        },
        "invocations": [{"executionSuccessful": True, "exitCode": int(any(not v.ok for v in verdicts))}],
        "results": [result for verdict in verdicts for result in _results(verdict, root)],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _results(verdict: Verified, root: Root) -> Iterator[dict[str, Any]]:
    seen: Counter[str] = Counter()
    for site, finding in findings_of(verdict):
        identity = _identity(root.shown(verdict.path), site, finding)
        yield _result(verdict, site, finding, root) | {
            "partialFingerprints": {_FINGERPRINT: f"{identity}:{seen[identity]}"}
        }
        seen[identity] += 1


def _result(verdict: Verified, site: SiteVerdict | None, finding: Finding, root: Root) -> dict[str, Any]:
    file = file_of(verdict, site)
    artifact: dict[str, Any] = {"uri": root.uri(file)}
    if root.relative(file) is not None:
        artifact["uriBaseId"] = _SOURCE_ROOT
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": artifact}}
    if site is not None:
        location["logicalLocations"] = _logical(site.name, finding.position)
    origin = f" ({site.origin})" if site is not None and site.origin else ""
    return {
        "ruleId": finding.rule,
        "ruleIndex": list(RULES).index(finding.rule),
        "level": "error",
        "message": {"text": escaped(f"{_subject(verdict, site)}: {finding.message}{origin}")},
        "locations": [location],
    }


def _logical(name: str, position: str | None) -> list[dict[str, str]]:
    tensor = escaped(name)
    found = {"name": tensor, "fullyQualifiedName": tensor, "kind": "variable"}
    if position is None:
        return [found]
    return [found, {"name": position, "fullyQualifiedName": f"{tensor}: {position}", "kind": "element"}]


def _identity(artifact: str, site: SiteVerdict | None, finding: Finding) -> str:
    """The same for the same finding in every run: independent of the shard and of the numbers in the message."""
    what = finding.message if site is None else site.name
    text = "\0".join((artifact, finding.rule, what, finding.position or ""))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
