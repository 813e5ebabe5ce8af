"""Both sets of kernels against the plain definition of each."""

import os
import sys
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx import sparsity
from spp_fx.native import host
from spp_fx.sparsity import _backend, _compile, _fallback, _kernels, _native
from spp_fx.sparsity.scan import pack_mask

compiled = _native.load_backend()
both = pytest.mark.parametrize("kernels", [compiled, _fallback.BACKEND], ids=lambda b: b.name)
seeds = st.integers(0, 2**32 - 1)
bf16 = (0x7FFF, 0x7F80, 0x80)
reads_files = pytest.mark.skipif(compiled.scan_descriptor is None, reason="no pread with 64-bit positions")


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


rules = {
    1: [(0x7F, 0x7F, 1), (0x7F, 0x7C, 4), (0xFF, 0, 0), (0x0F, 0, 0)],
    2: [(0x7FFF, 0x7F80, 0x80), (0x7FFF, 0x7C00, 0x400), (0xFFFF, 0, 0)],
    4: [(0x7FFFFFFF, 0x7F800000, 0x800000), (0xFFFFFFFF, 0, 0)],
    8: [((1 << 63) - 1, 0x7FF << 52, 1 << 52), ((1 << 64) - 1, 0, 0)],
}


@given(data=st.data(), seed=seeds, offset=st.integers(0, 7), width=st.sampled_from([1, 2, 4, 8]))
def test_both_scans_agree_on_any_bits_at_any_address(data, seed, offset, width):
    """Rules of real dtypes, arrays that begin anywhere in memory, non-finites as rare as they come."""
    count = data.draw(st.integers(0, 1000))
    rule = data.draw(st.sampled_from(rules[width]))
    generator = np.random.default_rng(seed)
    memory = generator.integers(0, 256, count * width + offset, dtype=np.uint8)
    memory[generator.random(memory.size) < 0.5] = 0
    elements = memory[offset:].view(f"<u{width}")
    if generator.random() < 0.5 and rule[2]:  # mostly finite
        strange = (elements & elements.dtype.type(rule[0])) - elements.dtype.type(rule[1]) < rule[2]
        elements[strange & (generator.random(count) < 0.99)] = 0
    size = (count + 7) // 8
    outs = [np.full(size + offset, 0x55, dtype=np.uint8) for _ in range(2)]
    found = [
        kernels.scan_elements(elements, *rule, out[offset:])
        for kernels, out in zip([compiled, _fallback.BACKEND], outs, strict=True)
    ]
    assert found[0] == found[1]
    assert np.array_equal(*outs)


@given(data=st.data(), seed=seeds, offset=st.integers(0, 7), group=st.integers(1, 64))
def test_both_counts_agree_on_long_masks_at_any_address(data, seed, offset, group):
    groups = data.draw(st.integers(0, 9000 // group))
    kept = data.draw(st.integers(0, group))
    bits = np.random.default_rng(seed).integers(0, 256, (groups * group + 7) // 8 + offset, dtype=np.uint8)
    bits.flags.writeable = False
    arguments = bits[offset:], groups, group, kept
    assert compiled.count_over(*arguments) == _fallback.BACKEND.count_over(*arguments)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("at", [0, 63, 64, 130, 191, 192, 199])
def test_the_first_of_two_non_finites_is_told(width, at):
    elements = np.zeros(200, dtype=f"u{width}")
    magnitude, start, span = rules[width][0]
    elements[[at, 199]] = start
    assert compiled.scan_elements(elements, magnitude, start, span, np.empty(25, dtype=np.uint8)) == (
        len({at, 199}),
        len({at, 199}),
        at,
    )


@reads_files
@given(data=st.data(), seed=seeds, width=st.sampled_from([1, 2, 4, 8]), words=st.integers(0, 70))
def test_a_scan_of_a_file_is_that_of_its_bytes_as_far_as_they_go(data, seed, width, words):
    """At any position, in pieces of any size; of a file that ends early, whole pieces are done and no more."""
    rule = data.draw(st.sampled_from(rules[width]))
    piece, before = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 9))
    there = data.draw(st.integers(0, words)) if data.draw(st.booleans()) else words
    generator = np.random.default_rng(seed)
    content = generator.integers(0, 256, before + 64 * words * width, dtype=np.uint8)
    content[generator.random(content.size) < 0.5] = 0
    size = before + 64 * there * width + (data.draw(st.integers(0, 64 * width - 1)) if there < words else 0)
    outs = [np.full(8 * words + 1, 0x55, dtype=np.uint8) for _ in range(2)]
    buffer = np.empty(64 * width * piece + data.draw(st.integers(0, 63)), dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        file.write(content[:size].tobytes())
        file.flush()
        scan = compiled.scan_descriptor
        done, *found = scan(file.fileno(), before, width, words, *rule, buffer, outs[0])
    assert done == (words if there == words else there // piece * piece)
    elements = content[before : before + 64 * width * done].view(f"<u{width}")
    assert tuple(found) == _fallback.BACKEND.scan_elements(elements, *rule, outs[1])
    assert np.array_equal(outs[0], outs[1])


@reads_files
def test_a_descriptor_that_cannot_be_read_is_left_to_who_asked(tmp_path):
    writing = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        out, buffer = np.empty(8, dtype=np.uint8), np.empty(128, dtype=np.uint8)
        assert compiled.scan_descriptor(writing, 0, 2, 1, *bf16, buffer, out) == (0, 0, 0, -1)
    finally:
        os.close(writing)


@reads_files
def test_memory_that_a_kernel_would_leave_is_refused():
    elements = np.zeros(128, dtype=np.uint16)
    with pytest.raises(ValueError, match="at least 16 bytes, not one of 15"):
        compiled.scan_elements(elements, *bf16, np.empty(15, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"contiguous array .* strides \(4,\)"):
        compiled.scan_elements(elements[::2], *bf16, np.empty(8, dtype=np.uint8))
    read_only = np.zeros(16, dtype=np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        compiled.scan_elements(elements, *bf16, read_only)
    with pytest.raises(ValueError, match="holds no word"):
        compiled.scan_descriptor(
            0, 0, 2, 1, *bf16, np.empty(127, dtype=np.uint8), np.empty(8, dtype=np.uint8)
        )
    with pytest.raises(ValueError, match="at least 16 bytes"):
        compiled.scan_descriptor(
            0, 0, 2, 2, *bf16, np.empty(128, dtype=np.uint8), np.empty(15, dtype=np.uint8)
        )
    with pytest.raises(ValueError, match="at least 16 bytes"):
        compiled.count_over(np.zeros(15, dtype=np.uint8), 32, 4, 2)


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
    _kernels.transpose_bits(source, target, 0, *shape)
    assert np.array_equal(target, packed(ones.T))


@both
@given(seed=seeds, rows=st.integers(0, 40), columns=st.integers(0, 150))
def test_locate_is_the_xor_of_positions(kernels, seed, rows, columns):
    ones = random_bits(seed, rows * columns).reshape(rows, columns)
    expected = [0] * 8
    for row, column in np.argwhere(ones).tolist():
        expected[row % 8] ^= row * columns + column + 1
    assert kernels.locate(packed(ones), rows, columns).tolist() == expected


@pytest.fixture
def anew(monkeypatch):
    """The backend is chosen again, and the kernels are imported again."""
    for name in ("_native", "_kernels", "_intrinsics", "_compile"):
        monkeypatch.delitem(sys.modules, f"spp_fx.sparsity.{name}", raising=False)
        monkeypatch.delattr(sparsity, name, raising=False)
    _backend.backend.cache_clear()
    yield
    _backend.backend.cache_clear()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("missing", ["spp_fx.native", "llvmlite"])
def test_the_numpy_kernels_take_over_where_llvmlite_is_missing(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("spp_fx.native")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert _backend.backend() is _fallback.BACKEND
    weight = torch.tensor([[1.0, -0.0, float("nan")]], dtype=torch.bfloat16)
    assert pack_mask(weight).to_bool().tolist() == [[True, False, True]]


@pytest.mark.usefixtures("anew")
def test_the_numpy_kernels_take_over_where_code_may_not_be_made(monkeypatch):
    def refuse():
        raise OSError(13, "cannot allocate executable memory")

    monkeypatch.setattr("llvmlite.binding.check_jit_execution", refuse)
    host.cache_clear()
    try:
        assert _backend.backend() is _fallback.BACKEND
    finally:
        host.cache_clear()


@pytest.mark.usefixtures("anew")
def test_numpy_does_the_rest_where_numba_alone_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    kernels = _backend.backend()
    assert kernels.name == "native"
    bits = packed(np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=bool))
    assert kernels.count_over(bits, 2, 5, 1) == 1
    assert kernels.first_over(bits, 2, 5, 1) == 1
    assert kernels.locate(bits, 2, 5).tolist() == [1, 6 ^ 7, 0, 0, 0, 0, 0, 0]
    assert "spp_fx.sparsity._kernels" not in sys.modules


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
