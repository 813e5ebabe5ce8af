"""BLAKE2b's compression (RFC 7693) of eight independent messages, one in each lane of a vector.

The chain within one message is serial: its 14 operations a step wait for each other, and a core that
could start several a cycle idles. Eight messages fill it: a vector of their words is one register on
AVX-512 (4 times hashlib), two on AVX2 (3 times). Narrower registers would lose to hashlib.
"""

import ctypes
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LANES = 8
BLOCK = 128  # bytes of a message that one compression takes

# The rows of a table (11, LANES) of uint64; a column is the state of one lane.
STATE = slice(0, 8)
COUNTER = 8  # bytes compressed before the next block
FINAL = 9  # all ones: the next block is the message's last
ADDRESS = 10  # where the next block lies in memory
ROWS = 11

IV = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)

Absorb = Callable[[NDArray[np.uint64], int], None]


def initial_state(digest_size: int) -> NDArray[np.uint64]:
    """(8,) uint64: the state before the first block, for a hash without a key (RFC 7693, 3.3)."""
    state = np.array(IV, dtype=np.uint64)
    state[0] ^= np.uint64(0x01010000 | digest_size)
    return state


def load_absorb() -> Absorb:
    """The kernel `absorb(table, blocks)`.

    It takes `blocks` consecutive blocks into every lane of a table (ROWS, LANES), and moves the lane's
    counter and address past them. All of them must be there to read.

    Raises:
        ImportError: llvmlite is missing, this CPU's vectors are too narrow to gain, or the system lets no
            process run code that it made.
    """
    from spp_fx.native import Library, address, host

    if sys.byteorder != "little":
        raise ImportError("the compiled hash reads message words as little-endian")
    if not host().has("avx2"):
        raise ImportError("hashlib hashes faster than vectors of less than 256 bits")
    library = Library("spp_fx.sparsity._blake2b_ir", constants=("spp_fx.sparsity._blake2b",))
    compiled = library.load({"absorb": ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)})["absorb"]

    def absorb(table: NDArray[np.uint64], blocks: int) -> None:
        compiled(address(table, ROWS * LANES * table.itemsize, write=True), blocks)

    return absorb
