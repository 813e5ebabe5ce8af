"""Verdicts of every kind, made by hand."""

import pytest

from spp_fx.verification.report import Root
from spp_fx.verification.verdict import RULES, Finding, SiteVerdict, Verified

HOSTILE = 'a\nb<&">\x1b[31m]]>\x00%0A::error::|`*\ud800\ufffe'


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path)


def site(number: int, *findings: Finding, name: str | None = None) -> SiteVerdict:
    return SiteVerdict(
        name or f"layers.{number}.weight",
        (8, 4),
        nnz=16,
        sparsity=0.5,
        file="w.safetensors",
        findings=findings,
    )


@pytest.fixture
def verdicts(tmp_path) -> list[Verified]:
    """One that holds; one with a finding of every rule and hostile names; one that cannot be read."""
    for name in ("good", "a b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").touch()
    places = {"mask-changed": "row 1, column 2", "pattern-broken": "row 1, columns 0-3"}
    failing = [
        site(
            number,
            Finding(rule, f"{places.get(rule, 'it')}: {HOSTILE}", places.get(rule)),
            name=f"{rule}{HOSTILE}",
        )
        for number, rule in enumerate(RULES)
    ]
    twice = Finding("mask-changed", "row 3, column 1: zero in the lock, non-zero now", "row 3, column 1")
    return [
        Verified(tmp_path / "good", "model", (site(0), site(1))),
        Verified(tmp_path / "a b", "adapter", (site(9), *failing, site(10, twice, twice))),
        Verified(tmp_path / "lost", "unknown", (), (Finding("artifact-damaged", HOSTILE),)),
    ]
