import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import NM, detect_pattern, parse_pattern, scan_bits


def exactly(kept: int, group: int, rows: int = 32, groups: int = 8, seed: int = 0) -> np.ndarray:
    """A mask with `kept` non-zeros, at random places, in every group."""
    order = np.random.default_rng(seed).random((rows, groups, group)).argsort(axis=-1)
    return (order < kept).reshape(rows, groups * group)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "2:8", "3:8", "8:16", "5:16"])
def test_a_pruned_mask_is_recognised(pattern):
    nm = parse_pattern(pattern)
    assert detect_pattern(PackedMask.from_bool(exactly(nm.kept, nm.group))) == nm


def test_the_smaller_group_is_the_answer_where_both_hold():
    mask = PackedMask.from_bool(exactly(2, 4))
    assert scan_bits(mask, NM(4, 8)).count == 0
    assert detect_pattern(mask) == NM(2, 4)


def test_one_of_two_is_answered_as_the_pattern_hardware_knows():
    assert detect_pattern(PackedMask.from_bool(exactly(1, 2))) == NM(2, 4)
    assert detect_pattern(PackedMask.from_bool(exactly(1, 2, groups=9))) == NM(1, 2), "18 columns"


def test_values_that_happen_to_be_zero_do_not_hide_a_pattern():
    ones = exactly(2, 4)
    ones[:3] = False
    assert detect_pattern(PackedMask.from_bool(ones)) == NM(2, 4)


def test_random_zeros_are_a_share_rounded_down():
    ones = np.random.default_rng(0).permuted(np.arange(256 * 256) >= 0.555 * 256 * 256).reshape(256, 256)
    assert str(detect_pattern(PackedMask.from_bool(ones))) == "55%"


@pytest.mark.parametrize(("zeros", "found"), [(0, None), (499, None), (500, "5%"), (10_000, "100%")])
def test_a_few_zeros_are_a_dense_weight(zeros, found):
    ones = np.ones((100, 100), dtype=bool)
    ones.reshape(-1)[:zeros] = False
    pattern = detect_pattern(PackedMask.from_bool(ones))
    assert (pattern and str(pattern)) == found


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(0, 40), st.floats(0, 1))
def test_a_detected_pattern_holds(seed, rows, columns, density):
    mask = PackedMask.from_bool(np.random.default_rng(seed).random((rows, columns)) < density)
    pattern = detect_pattern(mask)
    if pattern is not None:
        assert scan_bits(mask, pattern).count == 0
