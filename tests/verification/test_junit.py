"""The JUnit report is XML that parsers take, and its counts are those of its cases."""

from xml.etree import ElementTree

from spp_fx.verification.report import junit
from spp_fx.verification.verdict import RULES


def test_counts_are_those_of_the_cases(verdicts, root):
    whole = ElementTree.fromstring(junit(verdicts, root).encode())
    assert whole.tag == "testsuites"
    for suite in whole:
        cases = suite.findall("testcase")
        assert suite.get("tests") == str(len(cases))
        assert suite.get("failures") == str(sum(case.find("failure") is not None for case in cases))
        assert suite.get("errors") == suite.get("skipped") == "0"
    for count in ("tests", "failures", "errors", "skipped"):
        assert whole.get(count) == str(sum(int(suite.get(count, "")) for suite in whole))
    assert [suite.get("failures") for suite in whole] == ["0", str(len(RULES) + 1), "1"]


def test_names_and_reasons_from_files_stay_text(verdicts, root):
    text = junit(verdicts, root)
    assert text.replace("\n", "").isprintable()
    suite = ElementTree.fromstring(text.encode())[1]
    names = [case.get("name", "") for case in suite]
    assert names[1] == 'mask-changeda\\nb<&">\\x1b[31m]]>\\x00%0A::error::|`*\\ud800\\ufffe'
    assert len(set(names)) == len(names)


def test_a_failure_carries_its_rule_and_every_finding(verdicts, root):
    suite = ElementTree.fromstring(junit(verdicts, root).encode())[1]
    failure = suite[-1].find("failure")
    assert failure is not None
    assert failure.get("type") == "mask-changed"
    assert (failure.text or "").splitlines() == ["row 3, column 1: zero in the lock, non-zero now"] * 2


def test_artifacts_are_named_relative_to_the_checkout(verdicts, root):
    whole = ElementTree.fromstring(junit(verdicts, root).encode())
    assert [suite.get("name") for suite in whole] == [
        "spp-fx verify good",
        "spp-fx verify a b",
        "spp-fx verify lost",
    ]
    assert {case.get("classname") for case in whole[1]} == {"a b"}
