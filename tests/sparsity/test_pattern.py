from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.errors import UsageError
from spp_fx.sparsity.pattern import NM, Unstructured, parse_pattern

nm = st.integers(2, 64).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))
share = st.builds(Unstructured, st.integers(1, 10**8).map(lambda i: Fraction(i, 10**8)))


@given(nm | share)
def test_what_is_printed_parses_to_the_same_pattern(pattern):
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "pattern", "sparsity"),
    [
        ("2:4", NM(2, 4), 0.5),
        ("2:8", NM(2, 8), 0.75),
        (" 3:5 ", NM(3, 5), 0.4),
        ("50%", Unstructured(Fraction(1, 2)), 0.5),
        ("62.50%", Unstructured(Fraction(5, 8)), 0.625),
        ("100%", Unstructured(Fraction(1)), 1.0),
    ],
)
def test_patterns_in_their_usual_spelling(text, pattern, sparsity):
    assert parse_pattern(text) == pattern
    assert pattern.sparsity == pytest.approx(sparsity, abs=1e-15)  # one float division


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:", ":4", "2:4:8", "-1:4", "٢:٤", "2：4"),
        *("4:4", "0:4", "5:4", "1:1", "2:65", "9" * 5000 + ":4"),
        *("0%", "101%", "50", "0.5", "nan%", "1e1%", "50.1234567%", "9" * 5000 + "%"),
    ],
)
def test_other_text_is_refused_with_what_would_work(text):
    with pytest.raises(UsageError, match=r"2:4.*50%") as refusal:
        parse_pattern(text)
    assert len(str(refusal.value)) < 400


def test_a_share_that_cannot_be_printed_exactly_is_refused():
    with pytest.raises(UsageError, match="digits"):
        Unstructured(Fraction(1, 3))
