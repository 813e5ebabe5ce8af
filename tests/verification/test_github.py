"""Annotations and the step summary: nothing from a file is a command, a tag or a table's cell."""

import re

from spp_fx.verification.report import annotations, summary
from spp_fx.verification.verdict import RULES, Finding, Verified
from tests.verification.conftest import site


def test_an_annotation_names_file_and_site(verdicts, root):
    lines = list(annotations(verdicts, root))
    assert lines[len(RULES)].startswith(
        "::error title=layers.10.weight,file=a b/w.safetensors::w.safetensors: row 3, column 1"
    )
    assert lines[len(RULES) + 1].startswith("::error title=unknown::a")


def test_an_annotation_is_one_command(verdicts, root):
    for line in annotations(verdicts, root):
        assert line.isprintable()
        properties, _, message = line.removeprefix("::error ").partition("::")
        assert re.fullmatch(r"title=[^:,]+(,file=[^:,]+)?", properties)
        assert not re.search("%(?!25|3A|2C)", properties + message)


def test_ten_annotations_are_shown_and_the_last_counts_the_rest(tmp_path, root):
    def failing(count: int) -> list[str]:
        sites = tuple(site(number, Finding("dense-site", "is dense")) for number in range(count))
        return list(annotations([Verified(tmp_path, "model", sites)], root))

    assert len(failing(10)) == 10
    assert "more failures" not in failing(10)[-1]
    assert len(failing(25)) == 10
    assert failing(25)[-1].endswith("::and 16 more failures; see the log or --json")


def test_what_holds_is_not_annotated(verdicts, root):
    assert list(annotations(verdicts[:1], root)) == []


def test_the_summary_is_a_table_whatever_names_hold(verdicts, root):
    page = summary(verdicts, root)
    assert page.startswith("## spp-fx verify: 2 of 3 artifacts failed\n")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {7, 3}
    assert "<" not in page
    assert "`" not in page
    assert page.replace("\n", "").isprintable()
    assert "| ok | good | model | 2 | 0 | 50.00% |" in page


def test_a_long_summary_is_cut_and_counted(tmp_path, root):
    sites = tuple(site(number, Finding("dense-site", "is dense")) for number in range(33))
    page = summary([Verified(tmp_path, "model", sites)], root)
    assert page.count("is dense") == 20
    assert "and 13 more; `--json` lists all" in page
