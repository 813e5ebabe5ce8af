"""A verdict as JUnit XML, one test case a site: what CI servers show as tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from spp_fx.report.text import printable


def write_junit(verdict: Mapping[str, Any], artifact: Path, target: Path) -> None:
    """Write the JSON form of a verdict (see `verify --json`) as a JUnit report."""
    summary = verdict["summary"]
    suite = ElementTree.Element(
        "testsuite",
        name=f"spp-fx verify {artifact.name}",
        tests=str(summary["sites"]),
        failures=str(summary["failed"]),
        errors="0",
    )
    for site in verdict["sites"]:
        case = ElementTree.SubElement(
            suite, "testcase", classname=str(artifact.name), name=printable(site["name"])
        )
        if not site["ok"]:
            failure = ElementTree.SubElement(
                case, "failure", message=printable(site["reason"]), type="sparsity"
            )
            failure.text = printable(site["reason"])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(target, encoding="utf-8", xml_declaration=True)
