"""The SARIF report is what the 2.1.0 schema demands of the parts it has."""

import json
import re
from typing import Any
from urllib.parse import unquote

import pytest

from spp_fx.verification.report import Root, sarif
from spp_fx.verification.verdict import RULES, Finding, SiteVerdict, Verified

KEYS = {
    "log": {"$schema", "version", "runs"},
    "run": {"tool", "invocations", "results"},
    "driver": {"name", "version", "semanticVersion", "rules"},
    "rule": {"id", "shortDescription", "defaultConfiguration"},
    "result": {"ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"},
    "location": {"physicalLocation", "logicalLocations"},
    "artifactLocation": {"uri", "uriBaseId"},
    "logicalLocation": {"name", "fullyQualifiedName", "kind"},
}
"""Properties that the schema has in these objects; it allows no others."""


@pytest.fixture
def run(verdicts, root) -> dict[str, Any]:
    log = json.loads(sarif(verdicts, root))
    assert log["version"] == "2.1.0"
    assert log.keys() <= KEYS["log"]
    (run,) = log["runs"]
    return run


def test_the_objects_have_what_they_must_and_nothing_unknown(run):
    assert run.keys() <= KEYS["run"]
    driver = run["tool"]["driver"]
    assert driver.keys() <= KEYS["driver"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", driver["semanticVersion"])
    assert isinstance(run["invocations"][0]["executionSuccessful"], bool)
    for rule in driver["rules"]:
        assert rule.keys() <= KEYS["rule"]
        assert rule["shortDescription"]["text"]
    for result in run["results"]:
        assert result.keys() <= KEYS["result"]
        assert result["level"] in {"none", "note", "warning", "error"}
        assert result["message"]["text"].isprintable()
        for location in result["locations"]:
            assert location.keys() <= KEYS["location"]
            artifact = location["physicalLocation"]["artifactLocation"]
            assert artifact.keys() <= KEYS["artifactLocation"]
            assert re.fullmatch(r"[A-Za-z0-9%/._~:-]+", artifact["uri"])
            for logical in location.get("logicalLocations", []):
                assert logical.keys() <= KEYS["logicalLocation"]
                assert all(isinstance(text, str) and text.isprintable() for text in logical.values())


def test_rules_are_unique_and_results_point_at_theirs(run):
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == list(RULES)
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert {result["ruleId"] for result in run["results"]} == set(rules)


def test_a_result_names_file_tensor_and_place(run):
    result = run["results"][len(RULES)]
    location = result["locations"][0]
    artifact = location["physicalLocation"]["artifactLocation"]
    assert (artifact["uri"], artifact["uriBaseId"]) == ("a%20b/w.safetensors", "%SRCROOT%")
    tensor, place = location["logicalLocations"]
    assert tensor["name"] == "layers.10.weight"
    assert place["name"] == "row 3, column 1"
    assert result["message"]["text"].startswith("layers.10.weight: row 3, column 1: zero in the lock")


def test_fingerprints_are_stable_and_unique(verdicts, root, run):
    again = json.loads(sarif(list(reversed(verdicts)), root))["runs"][0]["results"]
    first, second = (
        [next(iter(result["partialFingerprints"].values())) for result in results]
        for results in (run["results"], again)
    )
    assert len(set(first)) == len(first)
    assert set(first) == set(second)


def test_a_fingerprint_knows_neither_shard_nor_numbers(tmp_path):
    def fingerprint(file: str, count: int) -> object:
        finding = Finding("pattern-broken", f"row 1 holds 3 ({count} groups in all)", "row 1, columns 0-3")
        verdict = Verified(
            tmp_path / "m", "model", (SiteVerdict("w", (4, 4), file=file, findings=(finding,)),)
        )
        return json.loads(sarif([verdict], Root(tmp_path)))["runs"][0]["results"][0]["partialFingerprints"]

    assert fingerprint("1.safetensors", 2) == fingerprint("2.safetensors", 5)


def test_a_file_outside_of_the_checkout_has_a_uri_of_its_own(verdicts, tmp_path):
    (tmp_path / "checkout").mkdir()
    results = json.loads(sarif(verdicts, Root(tmp_path / "checkout")))["runs"][0]["results"]
    artifact = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert artifact.keys() == {"uri"}
    assert unquote(artifact["uri"]) == f"file://{tmp_path}/a b/w.safetensors"


def test_nothing_wrong_is_no_result(verdicts, root):
    run = json.loads(sarif(verdicts[:1], root))["runs"][0]
    assert run["results"] == []
    assert run["invocations"][0]["exitCode"] == 0
