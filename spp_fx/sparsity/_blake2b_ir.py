"""BLAKE2b's compression in LLVM's own words: every word of RFC 7693 is a vector of eight messages' words."""

from typing import Any

from llvmlite import ir

from spp_fx.native.building import I32, I64, POINTER, broadcast, define, loop, pointer
from spp_fx.sparsity._blake2b import ADDRESS, BLOCK, COUNTER, FINAL, IV, LANES

_ROUNDS = 12
_SIGMA = (
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
_MIXED = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)

_WORDS = ir.VectorType(I64, LANES)
_ROW = LANES * 8  # bytes


def build() -> ir.Module:
    module = ir.Module("blake2b")
    _absorb(module)
    return module


def _absorb(module: ir.Module) -> None:
    """`void absorb(table, blocks)`: see `_blake2b.load_absorb`."""
    builder, (table, blocks) = define(module, "absorb", ir.VoidType(), [POINTER, I64])

    def row(index: int) -> Any:
        return pointer(builder, table, ir.Constant(I64, index * _ROW), _WORDS)

    counter, final, addresses = (builder.load(row(i), align=8) for i in (COUNTER, FINAL, ADDRESS))
    places = [builder.extract_element(addresses, ir.Constant(I32, lane)) for lane in range(LANES)]

    def step(index: Any, state: list[Any]) -> list[Any]:
        offset = builder.mul(index, ir.Constant(I64, BLOCK))
        message = _message(builder, places, offset)
        compressed = builder.add(offset, ir.Constant(I64, BLOCK))
        total = builder.add(counter, broadcast(builder, compressed, _WORDS))
        return _compress(builder, state, message, total, final)

    state = loop(builder, blocks, [builder.load(row(i), align=8) for i in range(8)], step)
    taken = broadcast(builder, builder.mul(blocks, ir.Constant(I64, BLOCK)), _WORDS)
    for index, words in enumerate(state):
        builder.store(words, row(index), align=8)
    builder.store(builder.add(counter, taken), row(COUNTER), align=8)
    builder.store(builder.add(addresses, taken), row(ADDRESS), align=8)
    builder.ret_void()


def _message(builder: ir.IRBuilder, places: list[Any], offset: Any) -> list[Any]:
    """The 16 words of the block that lies `offset` bytes past each lane's place."""
    message: list[Any] = []
    for half in (0, BLOCK // 2):
        lanes: list[Any] = []
        for place in places:
            start = builder.add(builder.add(place, offset), ir.Constant(I64, half))
            lanes.append(builder.load(builder.inttoptr(start, _WORDS.as_pointer()), align=1))
        message += _transpose(builder, lanes)
    return message


def _compress(
    builder: ir.IRBuilder, state: list[Any], message: list[Any], counter: Any, final: Any
) -> list[Any]:
    """The function F of RFC 7693, 3.2; `counter` counts the block that is taken."""
    v = [*state, *(_splat(word) for word in IV)]
    v[12] = builder.xor(v[12], counter)
    v[14] = builder.xor(v[14], final)
    for number in range(_ROUNDS):
        order = _SIGMA[number % len(_SIGMA)]
        for step, where in enumerate(_MIXED):
            _mix(builder, v, where, message[order[2 * step]], message[order[2 * step + 1]])
    return [builder.xor(word, builder.xor(v[i], v[i + 8])) for i, word in enumerate(state)]


def _mix(builder: ir.IRBuilder, v: list[Any], where: tuple[int, ...], x: Any, y: Any) -> None:
    """The function G of RFC 7693, 3.1."""
    a, b, c, d = where
    for word, first, second in ((x, 32, 24), (y, 16, 63)):
        v[a] = builder.add(builder.add(v[a], word), v[b])
        v[d] = _rotate_right(builder, builder.xor(v[d], v[a]), first)
        v[c] = builder.add(v[c], v[d])
        v[b] = _rotate_right(builder, builder.xor(v[b], v[c]), second)


def _rotate_right(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    return builder.or_(builder.lshr(value, _splat(count)), builder.shl(value, _splat(64 - count)))


def _transpose(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Transpose 8x8 words: exchange 1x1, 2x2, then 4x4 blocks between rows that lie that far apart."""
    for width in (1, 2, 4):
        low = [i + (LANES - width if i & width else 0) for i in range(LANES)]
        below = ir.Constant(ir.VectorType(I32, LANES), low)
        above = ir.Constant(ir.VectorType(I32, LANES), [i + width for i in low])
        rows = [
            builder.shuffle_vector(rows[i & ~width], rows[i | width], above if i & width else below)
            for i in range(LANES)
        ]
    return rows


def _splat(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)
