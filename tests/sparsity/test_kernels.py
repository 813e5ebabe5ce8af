"""Both sets of kernels against the plain definition of each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.sparsity import _backend, _compile, _fallback, _kernels, pack_mask

both = pytest.mark.parametrize("kernels", [_kernels.BACKEND, _fallback.BACKEND], ids=lambda b: b.name)
seeds = st.integers(0, 2**32 - 1)
bf16 = (0x7FFF, 0x7F80, 0x80)


def random_bits(seed: int, count: int, density: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < density


def packed(ones: np.ndarray) -> np.ndarray:
    return np.packbits(ones.reshape(-1), bitorder="little")


@both
@given(seed=seeds, count=st.integers(0, 400), width=st.sampled_from([1, 2, 4, 8]))
def test_scan_elements_is_a_comparison_with_zero(kernels, seed, count, width):
    generator = np.random.default_rng(seed)
    sign = 1 << (8 * width - 1)
    special = np.array([0, sign, sign - 1, sign >> 1, 1, sign | 1], dtype=f"u{width}")
    elements = special[generator.integers(0, special.size, count)]
    low, span = sign >> 1, sign >> 2
    out = np.full((count + 7) // 8 + 3, 0xAA, dtype=np.uint8)
    nnz, strange, first = kernels.scan_elements(elements, sign - 1, low, span, out)

    magnitudes = [int(e) & (sign - 1) for e in elements]
    ones = np.array([m != 0 for m in magnitudes], dtype=bool)
    where = [i for i, m in enumerate(magnitudes) if low <= m < low + span]
    assert np.array_equal(out[:-3], packed(ones))
    assert np.all(out[-3:] == 0xAA), "nothing past the mask is touched"
    assert (nnz, strange, first) == (ones.sum(), len(where), where[0] if where else -1)


@both
@given(data=st.data(), seed=seeds, groups=st.integers(0, 200), group=st.integers(2, 64))
def test_group_counts_are_sums_over_groups(kernels, data, seed, groups, group):
    kept = data.draw(st.integers(1, group - 1))
    ones = random_bits(seed, groups * group, kept / group)
    over = np.flatnonzero(ones.reshape(groups, group).sum(axis=1) > kept)
    arguments = packed(ones), groups, group, kept
    assert kernels.count_over(*arguments) == over.size
    assert kernels.first_over(*arguments) == (over[0] if over.size else -1)


@both
@pytest.mark.parametrize("group", [2, 4, 8, 16, 32, 64, 5, 63])
def test_every_kept_count_is_told_from_its_neighbours(kernels, group):
    ones = np.tri(group + 1, group, -1, dtype=bool)  # row i holds i ones
    for kept in range(1, group):
        assert kernels.count_over(packed(ones), group + 1, group, kept) == group - kept


@both
@given(seed=seeds, experts=st.integers(1, 3), rows=st.integers(0, 40), columns=st.integers(0, 40))
def test_transpose_bits_is_a_matrix_transpose(kernels, seed, experts, rows, columns):
    ones = random_bits(seed, experts * rows * columns).reshape(experts, rows, columns)
    source = packed(ones)
    target = np.zeros_like(source)
    for expert in range(experts):
        kernels.transpose_bits(source, target, expert * rows * columns, rows, columns)
    assert np.array_equal(target, packed(ones.transpose(0, 2, 1)))


@pytest.mark.parametrize("shape", [(520, 24), (1032, 80), (513, 77), (4104, 4096)])
def test_transpose_bits_across_tiles_and_threads(shape):
    ones = random_bits(1, shape[0] * shape[1]).reshape(shape)
    source = packed(ones)
    target = np.zeros_like(source)
    _kernels.BACKEND.transpose_bits(source, target, 0, *shape)
    assert np.array_equal(target, packed(ones.T))


@both
@given(seed=seeds, rows=st.integers(0, 40), columns=st.integers(0, 150))
def test_locate_is_the_xor_of_positions(kernels, seed, rows, columns):
    ones = random_bits(seed, rows * columns).reshape(rows, columns)
    expected = [0] * 8
    for row, column in np.argwhere(ones).tolist():
        expected[row % 8] ^= row * columns + column + 1
    assert kernels.locate(packed(ones), rows, columns).tolist() == expected


def test_the_numpy_kernels_take_over_where_numba_is_missing(monkeypatch):
    import sys

    import torch

    monkeypatch.delitem(sys.modules, "spp_fx.sparsity._kernels")
    monkeypatch.delattr("spp_fx.sparsity._kernels")
    monkeypatch.delitem(sys.modules, "spp_fx.sparsity._intrinsics", raising=False)
    monkeypatch.delitem(sys.modules, "spp_fx.sparsity._compile", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    _backend.backend.cache_clear()
    try:
        assert _backend.backend().name == "numpy"
        weight = torch.tensor([[1.0, -0.0, float("nan")]], dtype=torch.bfloat16)
        assert pack_mask(weight).to_bool().tolist() == [[True, False, True]]
    finally:
        _backend.backend.cache_clear()


def test_kernels_compile_without_a_cache_folder(monkeypatch):
    calls = []

    def njit(**options):
        calls.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(_compile, "njit", njit)
    assert _compile.compiled(len, fastmath=True) is len
    assert calls == [{"nogil": True, "cache": True, "fastmath": True}, {"nogil": True, "fastmath": True}]
