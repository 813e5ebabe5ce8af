"""A verdict as JUnit XML, one test case a site and a problem: what CI servers show as tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from spp_fx.report.text import printable


def write_junit(verdict: Mapping[str, Any], artifact: Path, target: Path) -> None:
    """Write the JSON form of a verdict (see `verify --json`) as a JUnit report."""
    summary, problems = verdict["summary"], verdict["problems"]
    suite = ElementTree.Element(
        "testsuite",
        name=f"spp-fx verify {artifact.name}",
        tests=str(summary["sites"] + len(problems)),
        failures=str(summary["failed"] + len(problems)),
        errors="0",
    )
    for problem in problems:
        _fail(_case(suite, artifact, verdict["kind"]), problem, "artifact")
    for site in verdict["sites"]:
        case = _case(suite, artifact, site["name"])
        if not site["ok"]:
            _fail(case, site["reason"], "sparsity")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(target, encoding="utf-8", xml_declaration=True)


def _case(suite: ElementTree.Element, artifact: Path, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=str(artifact.name), name=printable(name))


def _fail(case: ElementTree.Element, reason: str, kind: str) -> None:
    failure = ElementTree.SubElement(case, "failure", message=printable(reason), type=kind)
    failure.text = printable(reason)
