"""Kernels against the plain definition of each, and the compiled scan against the one in numpy."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx import compiled
from spp_fx.sparsity import kernels
from spp_fx.sparsity.compiled_scan import compile_scan
from spp_fx.sparsity.kernels import (
    ElementType,
    count_over,
    first_non_finite,
    first_over,
    locate,
    scan_elements,
    scanner,
    transpose_bits,
)
from spp_fx.sparsity.scan import pack_mask

widths = st.sampled_from([1, 2, 4, 8])
seeds = st.integers(0, 2**32 - 1)
machine_code = {width: compile_scan(width) for width in (1, 2, 4, 8)}
both = pytest.mark.parametrize(
    "scans", [machine_code, dict.fromkeys(machine_code, scan_elements)], ids=["compiled", "numpy"]
)


def random_bits(seed: int, count: int, density: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < density


def packed(ones: np.ndarray) -> np.ndarray:
    return np.packbits(ones.reshape(-1), bitorder="little")


@both
@given(seed=seeds, count=st.integers(0, 400), width=widths)
def test_scan_elements_is_a_comparison_with_zero(scans, seed, count, width):
    generator = np.random.default_rng(seed)
    sign = 1 << (8 * width - 1)
    special = np.array([0, sign, sign - 1, sign >> 1, 1, sign | 1], dtype=f"u{width}")
    elements = special[generator.integers(0, special.size, count)]
    kind = ElementType("", width, sign - 1, sign >> 1, sign >> 2)
    out = np.full((count + 7) // 8 + 3, 0xAA, dtype=np.uint8)
    found = scans[width](elements, kind, out)

    magnitudes = [int(e) & (sign - 1) for e in elements]
    infinite = [i for i, m in enumerate(magnitudes) if sign >> 1 <= m < (sign >> 1) + (sign >> 2)]
    assert np.array_equal(out[:-3], packed(np.array([m != 0 for m in magnitudes], dtype=bool)))
    assert np.all(out[-3:] == 0xAA), "nothing past the mask is touched"
    assert found == (sum(m != 0 for m in magnitudes), len(infinite))
    if infinite:
        assert first_non_finite(elements, kind) == infinite[0]


@given(
    dtype=st.sampled_from(
        ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "I8", "U16", "I64"]
    ),
    seed=seeds,
    offset=st.integers(0, 7),
    count=st.integers(0, 1000),
)
def test_both_scans_agree_on_any_bits_at_any_address(dtype, seed, offset, count):
    """Arrays that begin anywhere in memory, non-finites as rare as they come."""
    kind = kernels.element_type(dtype)
    generator = np.random.default_rng(seed)
    memory = generator.integers(0, 256, count * kind.itemsize + offset, dtype=np.uint8)
    memory[generator.random(memory.size) < 0.5] = 0
    elements = memory[offset:].view(f"<u{kind.itemsize}")
    if generator.random() < 0.5:  # mostly finite
        unsigned = elements.dtype.type
        magnitudes = elements & unsigned(kind.magnitude)
        infinite = magnitudes - unsigned(kind.non_finite_from) < unsigned(kind.non_finite_span)
        elements[infinite & (generator.random(count) < 0.99)] = 0
    outs = [np.full((count + 7) // 8 + offset, 0x55, dtype=np.uint8) for _ in range(2)]
    found = machine_code[kind.itemsize](elements, kind, outs[0][offset:])
    assert found == scan_elements(elements, kind, outs[1][offset:])
    assert np.array_equal(*outs)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_memory_that_the_machine_code_would_leave_is_refused(width):
    elements = np.zeros(128, dtype=f"u{width}")
    kind, scan = kernels.element_type(f"U{8 * width}"), machine_code[width]
    with pytest.raises(ValueError, match="15 writable bytes is too small for 128 elements"):
        scan(elements, kind, np.empty(15, dtype=np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        scan(elements[::2], kind, np.empty(16, dtype=np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        scan(elements, kind, np.empty(32, dtype=np.uint8)[::2])
    with pytest.raises(ValueError, match=f"elements of {width} bytes"):
        scan(np.zeros(128, dtype="u2" if width != 2 else "u4"), kind, np.empty(16, dtype=np.uint8))
    read_only = np.zeros(16, dtype=np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        scan(elements, kind, read_only)


@pytest.fixture(params=["compiled", "numpy"])
def counted(request, monkeypatch):
    """Groups are counted by this code, however few they are."""
    monkeypatch.setattr(kernels, "_COMPILED_WORDS", 0 if request.param == "compiled" else 1 << 62)


@pytest.mark.usefixtures("counted")
@given(data=st.data(), seed=seeds, offset=st.integers(0, 7), group=st.integers(1, 64))
def test_group_counts_are_sums_over_groups_at_any_address(data, seed, offset, group):
    groups = data.draw(st.integers(0, 9000 // group))
    kept = data.draw(st.integers(0, group))
    memory = np.random.default_rng(seed).integers(0, 256, (groups * group + 7) // 8 + offset, dtype=np.uint8)
    memory.flags.writeable = False
    ones = np.unpackbits(memory[offset:], bitorder="little")[: groups * group]
    over = np.flatnonzero(ones.reshape(groups, group).sum(axis=1) > kept)
    arguments = memory[offset:], groups, group, kept
    assert count_over(*arguments) == over.size
    assert first_over(*arguments) == (over[0] if over.size else -1)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("group", [2, 4, 8, 16, 32, 64, 5, 63])
def test_every_kept_count_is_told_from_its_neighbours(group):
    ones = np.tri(group + 1, group, -1, dtype=bool)  # row i holds i ones
    for kept in range(1, group):
        assert count_over(packed(ones), group + 1, group, kept) == group - kept


@pytest.mark.usefixtures("counted")
def test_groups_are_counted_across_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK_WORDS", 4)
    monkeypatch.setattr(kernels, "_BLOCK_BITS", 100)
    for group in (4, 5):
        ones = random_bits(group, 1000 * group).reshape(1000, group)
        assert count_over(packed(ones), 1000, group, 2) == (ones.sum(axis=1) > 2).sum()
        late = np.zeros((1000, group), dtype=bool)
        late[997] = True
        assert first_over(packed(late), 1000, group, 2) == 997


@given(seed=seeds, experts=st.integers(0, 3), rows=st.integers(0, 40), columns=st.integers(0, 40))
def test_transpose_bits_is_a_matrix_transpose(seed, experts, rows, columns):
    ones = random_bits(seed, experts * rows * columns).reshape(experts, rows, columns)
    assert np.array_equal(transpose_bits(packed(ones), ones.shape), packed(ones.transpose(0, 2, 1)))


@pytest.mark.parametrize("shape", [(64, 64), (3, 128, 192), (2, 64, 130), (130, 64), (513, 77), (4160, 320)])
def test_transpose_bits_moves_whole_words_and_parts_of_words(shape):
    ones = random_bits(1, np.prod(shape)).reshape(shape)
    source = packed(ones)
    source.flags.writeable = False
    assert np.array_equal(transpose_bits(source, shape), packed(np.swapaxes(ones, -1, -2)))


@given(seed=seeds, rows=st.integers(0, 40), columns=st.integers(0, 150))
def test_locate_is_the_xor_of_positions(seed, rows, columns):
    ones = random_bits(seed, rows * columns).reshape(rows, columns)
    expected = [0] * 8
    for row, column in np.argwhere(ones).tolist():
        expected[row % 8] ^= row * columns + column + 1
    assert locate(packed(ones), rows, columns) == expected


@pytest.mark.parametrize("columns", [64, 100])
def test_locate_across_blocks(monkeypatch, columns):
    whole = locate(packed(random_bits(2, 999 * columns)), 999, columns)
    monkeypatch.setattr(kernels, "_BLOCK_WORDS", 5)
    assert locate(packed(random_bits(2, 999 * columns)), 999, columns) == whole


@pytest.fixture
def anew(monkeypatch):
    """The scanner is chosen again, and the compiled one is imported again."""
    monkeypatch.setattr(kernels, "_scanners", {})
    monkeypatch.delitem(sys.modules, "spp_fx.sparsity.compiled_scan")
    compiled.optional_module.cache_clear()
    yield
    compiled.optional_module.cache_clear()


@pytest.mark.usefixtures("anew")
def test_numpy_scans_where_llvmlite_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert scanner(2) is scan_elements
    weight = torch.tensor([[1.0, -0.0, float("nan")]], dtype=torch.bfloat16)
    assert pack_mask(weight).to_bool().tolist() == [[True, False, True]]


@pytest.mark.usefixtures("anew")
def test_numpy_scans_where_code_may_not_be_made(monkeypatch):
    def refuse():
        raise OSError(13, "cannot allocate executable memory")

    monkeypatch.setattr("llvmlite.binding.check_jit_execution", refuse)
    assert scanner(2) is scan_elements


@pytest.mark.usefixtures("anew")
def test_threads_that_begin_to_scan_at_once_share_one_scanner():
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: scanner(2), range(8)))
    assert len(found) == 1
    assert found != {scan_elements}


def test_kernels_compile_without_a_cache_folder(monkeypatch):
    calls = []

    def njit(**options):
        calls.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr("numba.njit", njit)
    assert compiled.compiled(len, fastmath=True) is len
    assert calls == [{"nogil": True, "cache": True, "fastmath": True}, {"nogil": True, "fastmath": True}]
