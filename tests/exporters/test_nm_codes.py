"""Codes of N:M groups: what is taken apart comes together again, bit for bit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.errors import PatternError
from spp_fx.exporters.onnx.encodings import code_for, encode_groups
from spp_fx.sparsity.pattern import NM
from tests.effort import examples


def together(code, values, codes):
    """The definition: each value stands where the table says."""
    dense = np.zeros((len(codes), code.entries), dtype=values.dtype)
    for run, number in enumerate(codes):
        for value, position in zip(values[run], code.table[number], strict=True):
            dense[run, position] = value
    return dense.reshape(-1)


@st.composite
def patterns(draw):
    group = draw(st.integers(2, 16))
    return NM(draw(st.integers(1, group - 1)), group)


@examples(15)
@given(
    patterns(), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1), st.booleans()
)
def test_a_weight_comes_back_bit_for_bit(pattern, groups, width, seed, sparse_groups):
    if math.comb(pattern.group, pattern.kept) > 2**16:
        return
    rng = np.random.default_rng(seed)
    dtype = np.dtype(f"u{width}")
    weight = rng.integers(
        1, np.iinfo(dtype).max, (groups, pattern.group), dtype=dtype
    )  # subnormals, NaNs, signs
    for row in weight:
        kept = int(rng.integers(0, pattern.kept + 1)) if sparse_groups else pattern.kept
        row[rng.permutation(pattern.group)[kept:]] = 0
    code = code_for(pattern, weight.size)
    values, codes, cleared = encode_groups(code, weight.reshape(-1), 1 << (8 * width - 1))
    assert cleared == 0
    assert (values.shape, codes.shape) == (
        (weight.size // code.entries, code.kept),
        (weight.size // code.entries,),
    )
    np.testing.assert_array_equal(together(code, values, codes), weight.reshape(-1))


@pytest.mark.parametrize(
    ("pattern", "groups", "bits_per_entry"),
    [
        ((2, 4), 2, 1.0),
        ((1, 2), 8, 0.5),
        ((1, 4), 4, 0.5),
        ((4, 8), 1, 1.0),
        ((2, 8), 1, 1.0),
        ((8, 16), 1, 1.0),
    ],
)
def test_codes_are_short(pattern, groups, bits_per_entry):
    code = code_for(NM(*pattern), 1024)
    assert code.groups == groups
    assert 8 * code.dtype.itemsize / code.entries == bits_per_entry
    assert (np.diff(code.table, axis=1) > 0).all()
    assert code.table.max() < code.entries
    assert len(np.unique(code.table, axis=0)) == len(code.table)


def test_a_run_never_crosses_the_end_of_the_weight():
    assert code_for(NM(2, 4), 12).groups == 1  # three groups


def test_negative_zeros_are_kept_where_a_position_is_free_and_counted_where_none_is():
    minus = np.uint16(0x8000)
    weight = np.array([1, minus, 0, 0, 1, 2, minus, minus], dtype=np.uint16)
    values, codes, cleared = encode_groups(code_for(NM(2, 4), 8), weight, 0x8000)
    assert cleared == 2
    np.testing.assert_array_equal(
        together(code_for(NM(2, 4), 8), values, codes),
        np.array([1, minus, 0, 0, 1, 2, 0, 0], dtype=np.uint16),
    )


def test_a_group_with_too_many_is_refused_with_its_place():
    weight = np.zeros(64, dtype=np.uint16)
    weight[41:44] = 7
    with pytest.raises(PatternError, match="4 elements from 40 on keep 3, 2:4 allows 2"):
        encode_groups(code_for(NM(2, 4), 64), weight, 0x8000)
