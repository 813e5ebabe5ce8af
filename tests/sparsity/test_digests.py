"""digest_masks against hashlib, which is BLAKE2b's definition here."""

import hashlib
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx import native, sparsity
from spp_fx.native import Host
from spp_fx.sparsity import _blake2b
from spp_fx.sparsity import mask as digests
from spp_fx.sparsity.mask import PackedMask, digest_masks


def random_mask(*shape: int, seed: int = 0) -> PackedMask:
    return PackedMask.from_bool(np.random.default_rng(seed).random(shape) < 0.5)


def by_definition(mask: PackedMask) -> str:
    shape = b"".join(size.to_bytes(8, "little") for size in mask.shape)
    return hashlib.blake2b(shape + mask.bits.tobytes(), digest_size=32).hexdigest()


def found(masks: list[PackedMask]) -> list[str | None]:
    """What digest_masks stored, without asking a mask that has no digest yet."""
    digest_masks(masks)
    return [mask.__dict__.get("digest") for mask in masks]


@pytest.fixture(scope="module")
def kernel():
    """The compiled kernel, where this CPU gains by it."""
    try:
        return _blake2b.load_absorb()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def only_lanes(monkeypatch, kernel):
    """Every mask goes into a lane, however small or few they are; hashlib would be an error."""
    monkeypatch.setattr(digests, "_SMALL", 0)
    monkeypatch.setattr(digests, "_LANES_COST", 0)
    monkeypatch.setattr(sparsity.mask, "digest_state", None)


@pytest.fixture
def anew():
    """The kernel is looked for again."""
    digests._kernel.cache_clear()
    yield
    digests._kernel.cache_clear()


def in_bytes(size: int, experts: int) -> tuple[int, ...]:
    return (size, 8) if experts == 0 else (experts, size, 8)


around_blocks = st.builds(
    lambda blocks, header, off: max(0, 128 * blocks - header + off),
    st.integers(0, 5),
    st.sampled_from([0, 16, 24]),
    st.integers(-2, 2),
)
shapes = st.one_of(
    st.builds(in_bytes, around_blocks, st.integers(0, 2)),
    st.builds(in_bytes, st.integers(0, 200_000), st.integers(0, 2)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 3), st.integers(0, 99), st.integers(0, 99)),
)


@given(shapes=st.lists(shapes, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_any_number_of_masks_of_any_size_get_hashlibs_digests(shapes, seed):
    masks = [random_mask(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17])
def test_any_number_of_lanes_may_idle(count):
    masks = [random_mask(300 + 50 * i, 40, seed=i) for i in range(count)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
@pytest.mark.parametrize("header", [16, 24])
def test_every_length_of_a_last_block_is_padded(header):
    experts = (header - 16) // 8
    masks = [random_mask(*in_bytes(size, experts), seed=size) for size in range(385)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
@given(shapes=st.lists(shapes, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_lanes_take_the_next_mask_when_one_ends(shapes, seed):
    masks = [random_mask(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
def test_a_mask_without_bits_and_a_mask_of_one_bit():
    masks = [random_mask(0, 4), random_mask(2, 0, 3), random_mask(1, 1), random_mask(1, 1, 1)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
def test_bits_may_start_at_any_byte_of_read_only_memory():
    memory = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)
    memory.flags.writeable = False
    masks = [PackedMask((100, 8 * 15), memory[at : at + 1500]) for at in range(20)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("only_lanes")
def test_bits_are_not_copied():
    masks = [random_mask(1000, 8000 + i, seed=i) for i in range(8)]
    digest_masks([random_mask(10, 10)])  # loads the kernel
    tracemalloc.start()
    digest_masks(masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < masks[0].bits.size / 4


def test_the_order_of_the_masks_does_not_matter_to_their_digests():
    masks = [random_mask(400 * (1 + i % 5), 1000, seed=i) for i in range(12)]
    again = [PackedMask(mask.shape, mask.bits) for mask in reversed(masks)]
    assert found(masks) == found(again)[::-1]


@pytest.mark.usefixtures("kernel")
def test_a_mask_given_twice_is_hashed_once(monkeypatch):
    taken = []
    monkeypatch.setattr(digests, "_hash_in_lanes", lambda absorb, masks: taken.extend(masks))
    mask, other = random_mask(1000, 1000), random_mask(1000, 1000, seed=1)
    monkeypatch.setattr(digests, "_LANES_COST", 0)
    digest_masks([mask, other, mask])
    assert sorted(map(id, taken)) == sorted(map(id, [mask, other]))


def test_a_digest_that_is_known_stays():
    mask = random_mask(1000, 1000)
    known = PackedMask.measured(mask.shape, mask.bits, mask.nnz, "0" * 64)
    assert found([known, mask]) == ["0" * 64, by_definition(mask)]


@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        ([], []),
        ([9], []),
        ([5] * 8, [5] * 8),
        ([5] * 9, [5] * 8),
        ([5] * 12, [5] * 12),
        ([900, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 8),
    ],
)
def test_masks_that_would_leave_the_lanes_idle_are_hashed_alone(sizes, together):
    masks = [PackedMask((size, 8), np.zeros(size, dtype=np.uint8)) for size in sizes]
    assert [mask.bits.size for mask in digests._worth_lanes(masks)] == together


@pytest.mark.usefixtures("kernel")
def test_threads_hash_side_by_side():
    masks = [random_mask(1000, 400 + i, seed=i) for i in range(32)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(digest_masks, [masks[at : at + 8] for at in range(0, 32, 8)]))
    assert [mask.digest for mask in masks] == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("anew")
def test_hashlib_takes_over_where_llvmlite_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spp_fx.native", None)
    assert digests._kernel() is None
    masks = [random_mask(1000, 400 + i, seed=i) for i in range(9)]
    assert found(masks) == [by_definition(mask) for mask in masks]


@pytest.mark.usefixtures("anew")
def test_hashlib_takes_over_where_vectors_are_narrow(monkeypatch):
    monkeypatch.setattr(native, "host", lambda: Host("x86_64-unknown-linux-gnu", "nehalem", "+sse4.2,-avx2"))
    assert digests._kernel() is None


def test_the_kernel_takes_the_blocks_of_the_specification(kernel):
    """RFC 7693, Appendix A: BLAKE2b-512 of "abc", the one digest that is not hashlib's word."""
    block = np.zeros(128, dtype=np.uint8)
    block[:3] = list(b"abc")
    table = np.zeros((_blake2b.ROWS, _blake2b.LANES), dtype=np.uint64)
    table[_blake2b.STATE] = _blake2b.initial_state(64)[:, None]
    table[_blake2b.COUNTER] = 3 - 128 + (1 << 64)
    table[_blake2b.FINAL] = ~np.uint64(0)
    table[_blake2b.ADDRESS] = block.ctypes.data
    kernel(table, 1)
    assert {column.tobytes().hex()[:32] for column in table[_blake2b.STATE].T} == {
        "ba80a53f981c4d0d6a2797b69f12f6e9"
    }


def test_the_kernel_refuses_a_table_that_it_would_leave(kernel):
    with pytest.raises(ValueError, match="at least 704 bytes"):
        kernel(np.zeros((8, 8), dtype=np.uint64), 0)
