"""Verdicts as JUnit XML, one suite an artifact, one case a site and a problem: what CI servers show as tests."""

from collections.abc import Sequence
from xml.etree import ElementTree

from spp_fx.errors import escaped
from spp_fx.report.place import Root
from spp_fx.report.verdict import Finding, Verified

_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>'


def junit(verdicts: Sequence[Verified], root: Root) -> str:
    """The report as XML text; an artifact that cannot be read is a suite of one failing case."""
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
