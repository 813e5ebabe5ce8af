"""Both sets of kernels against the plain definition of each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.exporters import _bitmask_numba, _bitmask_numpy, bitmask
from tests.effort import examples

both = pytest.mark.parametrize(
    "kernels", [_bitmask_numba.KERNELS, _bitmask_numpy.KERNELS], ids=lambda kernels: kernels.name
)


def drawn(seed: int, count: int, width: int, density: float) -> np.ndarray:
    """Random elements with zeros, zeros of negative sign, subnormals and the largest number among them."""
    generator = np.random.default_rng(seed)
    sign = 1 << (8 * width - 1)
    special = np.array([sign, 1, sign | 1, 2 * sign - 1, 7], dtype=f"<u{width}")
    elements = special[generator.integers(0, special.size, count)]
    elements[generator.random(count) >= density] = 0
    return elements


@both
@examples(25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 300),
    width=st.sampled_from([1, 2, 4, 8]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_compress_keeps_what_has_a_bit_and_expand_puts_it_back(kernels, seed, count, width, density):
    elements = drawn(seed, count, width, density)
    room = np.full_like(elements, 0xAA)
    kept = [element for element in elements.tolist() if element != 0]
    assert kernels.compress(elements, room) == len(kept)
    assert room[: len(kept)].tolist() == kept
    bits = np.packbits(elements != 0, bitorder="little")
    assert bitmask.ones(bits) == len(kept)
    again = np.full_like(elements, 0x55)
    kernels.expand(bits, room[: len(kept)].copy(), again)
    assert again.tolist() == elements.tolist()


def test_the_compiled_kernels_run_where_numba_is():
    assert bitmask.kernels().name == "numba"
