"""BLAKE2b's compression (RFC 7693) of eight independent messages, one in each lane of a vector.

The chain within one message is serial: its 14 operations a step wait for each other, and a core that
could start several a cycle idles. Eight messages fill it: a vector of their words is one register on
AVX-512 (4 times hashlib), two on AVX2 (3 times). Narrower registers would lose to hashlib.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray

from spp_fx.sparsity._compile import compiled

if sys.byteorder != "little":
    raise ImportError("the compiled hash reads message words as little-endian")
if "+avx2" not in get_host_cpu_features().split(","):
    raise ImportError("hashlib hashes faster than vectors of less than 256 bits")

LANES = 8
BLOCK = 128  # bytes of a message that one compression takes
ROUNDS = 12

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
SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
# The columns, then the diagonals, of the 4x4 matrix of working words.
MIXED = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_WORDS = ir.VectorType(_I64, LANES)
_ROW = LANES * 8  # bytes


def initial_state(digest_size: int) -> NDArray[np.uint64]:
    """(8,) uint64: the state before the first block, for a hash without a key (RFC 7693, 3.3)."""
    state = np.array(IV, dtype=np.uint64)
    state[0] ^= np.uint64(0x01010000 | digest_size)
    return state


def _splat(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose 8x8 words: exchange 1x1, 2x2, then 4x4 blocks between rows that lie that far apart."""
    for width in (1, 2, 4):
        low = [i + (LANES - width if i & width else 0) for i in range(LANES)]
        below = ir.Constant(ir.VectorType(_I32, LANES), low)
        above = ir.Constant(ir.VectorType(_I32, LANES), [i + width for i in low])
        rows = [
            builder.shuffle_vector(rows[i & ~width], rows[i | width], above if i & width else below)
            for i in range(LANES)
        ]
    return rows


def _rotate_right(builder: Any, value: Any, count: int) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
    funnel = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fshr.v{LANES}i64")
    return builder.call(funnel, [value, value, _splat(count)])


def _mix(builder: Any, v: list[Any], where: tuple[int, ...], x: Any, y: Any) -> None:
    """The function G of RFC 7693, 3.1."""
    a, b, c, d = where
    for word, first, second in ((x, 32, 24), (y, 16, 63)):
        v[a] = builder.add(builder.add(v[a], word), v[b])
        v[d] = _rotate_right(builder, builder.xor(v[d], v[a]), first)
        v[c] = builder.add(v[c], v[d])
        v[b] = _rotate_right(builder, builder.xor(v[b], v[c]), second)


@intrinsic
def _compress_lanes(typing: Any, table: Any, offset: Any) -> Any:
    """Compress into every lane the block `offset` bytes past its address (RFC 7693, 3.2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        start = builder.bitcast(data, ir.IntType(8).as_pointer())
        offset = arguments[1]

        def place(byte: int, kind: Any) -> Any:
            return builder.bitcast(builder.gep(start, [ir.Constant(_I64, byte)]), kind.as_pointer())

        def row(index: int) -> Any:
            return builder.load(place(index * _ROW, _WORDS), align=8)

        message: list[Any] = []
        for half in (0, BLOCK // 2):
            lanes: list[Any] = []
            for lane in range(LANES):
                address = builder.load(place(ADDRESS * _ROW + lane * 8, _I64), align=8)
                address = builder.add(builder.add(address, offset), ir.Constant(_I64, half))
                lanes.append(builder.load(builder.inttoptr(address, _WORDS.as_pointer()), align=1))
            message += _transpose(builder, lanes)

        undefined = ir.Constant(_WORDS, ir.Undefined)
        compressed = builder.insert_element(
            undefined, builder.add(offset, ir.Constant(_I64, BLOCK)), ir.Constant(_I32, 0)
        )
        compressed = builder.shuffle_vector(
            compressed, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        )
        state = [row(index) for index in range(8)]
        v = [*state, *(_splat(word) for word in IV)]
        v[12] = builder.xor(v[12], builder.add(row(COUNTER), compressed))
        v[14] = builder.xor(v[14], row(FINAL))
        for number in range(ROUNDS):
            order = SIGMA[number % len(SIGMA)]
            for step, where in enumerate(MIXED):
                _mix(builder, v, where, message[order[2 * step]], message[order[2 * step + 1]])
        for index, word in enumerate(state):
            mixed = builder.xor(word, builder.xor(v[index], v[index + 8]))
            builder.store(mixed, place(index * _ROW, _WORDS), align=8)
        return context.get_dummy_value()

    return types.void(table, types.int64), generate


# Spelled as an untyped callable: a call inside a kernel leaves out the typing context of the definition.
_compress: Callable[..., Any] = _compress_lanes


@compiled
def absorb(table: NDArray[np.uint64], blocks: int) -> None:
    """Take `blocks` consecutive blocks into every lane, and move its counter and address past them."""
    for block in range(blocks):
        _compress(table, block * BLOCK)
    for lane in range(LANES):
        table[COUNTER, lane] += np.uint64(blocks * BLOCK)
        table[ADDRESS, lane] += np.uint64(blocks * BLOCK)
