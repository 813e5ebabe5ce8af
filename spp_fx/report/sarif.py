"""Verdicts as SARIF 2.1.0: what code scanning and other viewers of static results read.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html. Weights have no lines, so a result names its
file, and tensor, row and column as logical locations.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from spp_fx.errors import escaped
from spp_fx.report.place import Root, file_of
from spp_fx.report.verdict import RULES, Finding, SiteVerdict, Verified, findings_of
from spp_fx.version import VERSION

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
        location["logicalLocations"] = _logical(site.name, finding.place)
    about = verdict.kind if site is None else site.name
    origin = f" ({site.origin})" if site is not None and site.origin else ""
    return {
        "ruleId": finding.rule,
        "ruleIndex": list(RULES).index(finding.rule),
        "level": "error",
        "message": {"text": escaped(f"{about}: {finding.message}{origin}")},
        "locations": [location],
    }


def _logical(name: str, place: str | None) -> list[dict[str, str]]:
    tensor = escaped(name)
    found = {"name": tensor, "fullyQualifiedName": tensor, "kind": "variable"}
    if place is None:
        return [found]
    return [found, {"name": place, "fullyQualifiedName": f"{tensor}: {place}", "kind": "element"}]


def _identity(artifact: str, site: SiteVerdict | None, finding: Finding) -> str:
    """The same for the same finding in every run: it knows neither the shard nor the numbers in the message."""
    what = finding.message if site is None else site.name
    text = "\0".join((artifact, finding.rule, what, finding.place or ""))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
