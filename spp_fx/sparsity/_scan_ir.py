"""The kernels that look at every weight, in memory or in a file, and at every mask word, in LLVM's own words.

LLVM lowers a comparison of 64 lanes whose result is read as a 64-bit integer to one or two mask
instructions on AVX-512 and to pack/movemask sequences elsewhere, so one definition serves every CPU.
Addresses need no alignment.
"""

from typing import Any

from llvmlite import ir

from spp_fx.native.building import I32, I64, POINTER, broadcast, define, loop, pointer
from spp_fx.sparsity._native import GROUPS, WIDTHS

_LANES = 64
_WORD_BYTES = 8
_ALL_ONES = (1 << 64) - 1


def build() -> ir.Module:
    module = ir.Module("sparsity")
    for width in WIDTHS:
        _read(module, width, _scan(module, width))
    for group in GROUPS:
        _count(module, group)
    return module


def _scan(module: ir.Module, width: int) -> ir.Function:
    """`void scan<width>(elements, words, magnitude, start, span, out, found)`.

    64 * words elements of `width` bits -> as many mask words in `out`, and in `found` (3 x i64) what
    `Backend.scan_elements` returns.
    """
    arguments = [POINTER, I64, I64, I64, I64, POINTER, POINTER]
    builder, (elements, words, *rule, out, found) = define(module, f"scan{width}", ir.VoidType(), arguments)
    vector = ir.VectorType(ir.IntType(width), _LANES)
    scalars = [value if width == 64 else builder.trunc(value, vector.element) for value in rule]
    magnitude, start, span = (broadcast(builder, scalar, vector) for scalar in scalars)
    none = ir.Constant(I64, 0)

    def step(index: Any, carried: list[Any]) -> list[Any]:
        non_zeros, non_finites, first = carried
        offset = builder.mul(index, ir.Constant(I64, _LANES * width // 8))
        values = builder.load(pointer(builder, elements, offset, vector), align=1)
        magnitudes = builder.and_(values, magnitude)
        non_zero = builder.icmp_unsigned("!=", magnitudes, ir.Constant(vector, [0] * _LANES))
        ones = builder.bitcast(non_zero, I64)
        word = pointer(builder, out, builder.mul(index, ir.Constant(I64, _WORD_BYTES)), I64)
        builder.store(ones, word, align=1)
        strange = builder.icmp_unsigned("<", builder.sub(magnitudes, start), span)
        strange = builder.bitcast(strange, I64)

        here = builder.block
        with builder.if_then(builder.icmp_unsigned("!=", strange, none), likely=False):
            at = builder.add(builder.mul(index, ir.Constant(I64, _LANES)), _trailing_zeros(builder, strange))
            unset = builder.icmp_signed("<", first, none)
            found_first = builder.select(unset, at, first)
            found_count = builder.add(non_finites, builder.ctpop(strange))
            there = builder.block
        merged = [builder.phi(I64), builder.phi(I64)]
        for phi, old, new in zip(merged, (non_finites, first), (found_count, found_first), strict=True):
            phi.add_incoming(old, here)
            phi.add_incoming(new, there)
        return [builder.add(non_zeros, builder.ctpop(ones)), *merged]

    for slot, total in enumerate(loop(builder, words, [none, none, ir.Constant(I64, -1)], step)):
        place = pointer(builder, found, ir.Constant(I64, slot * _WORD_BYTES), I64)
        builder.store(total, place, align=_WORD_BYTES)
    builder.ret_void()
    return builder.function


def _read(module: ir.Module, width: int, scan: ir.Function) -> None:
    """`i64 read<width>(pread, descriptor, position, words, magnitude, start, span, buffer, piece, out, found)`.

    As `scan<width>` of what lies at a position of a file, which is read into `buffer`, `piece` words (at least
    1) at a time. Returns how many words were done: all, or those before the first read that was not whole, be
    it for a signal, an error or the file's end, which it leaves to the caller to tell apart.
    """
    arguments = [POINTER, I32, I64, I64, I64, I64, I64, POINTER, I64, POINTER, POINTER]
    builder, values = define(module, f"read{width}", I64, arguments)
    pread, descriptor, position, words, magnitude, start, span, buffer, piece, out, found = values
    signature = ir.FunctionType(I64, [I32, POINTER, I64, I64])  # C's pread, where off_t has 64 bits
    pread = builder.bitcast(pread, signature.as_pointer())
    word_bytes = ir.Constant(I64, _LANES * width // 8)
    none = ir.Constant(I64, 0)
    here = builder.bitcast(builder.alloca(I64, 3), POINTER)  # what one piece gives
    slots = [ir.Constant(I64, slot * _WORD_BYTES) for slot in range(3)]
    pieces = builder.sdiv(builder.add(words, builder.sub(piece, ir.Constant(I64, 1))), piece)

    def step(index: Any, carried: list[Any]) -> list[Any]:
        done, non_zeros, non_finites, first = carried
        # After a piece that failed, those behind it are of no size: they would leave a hole.
        behind = builder.mul(index, piece)
        left = builder.sub(words, behind)
        size = builder.select(builder.icmp_signed("<", left, piece), left, piece)
        size = builder.select(builder.icmp_signed("==", done, behind), size, none)
        wanted = builder.mul(size, word_bytes)
        place = builder.add(position, builder.mul(behind, word_bytes))
        got = builder.call(pread, [descriptor, buffer, wanted, place])
        size = builder.select(builder.icmp_signed("==", got, wanted), size, none)
        target = builder.gep(out, [builder.mul(behind, ir.Constant(I64, _WORD_BYTES))])
        builder.call(scan, [buffer, size, magnitude, start, span, target, here])
        ones, strange, at = (builder.load(pointer(builder, here, slot, I64)) for slot in slots)
        is_first = builder.and_(builder.icmp_signed("<", first, none), builder.icmp_signed(">=", at, none))
        at = builder.add(at, builder.mul(behind, ir.Constant(I64, _LANES)))
        return [
            builder.add(done, size),
            builder.add(non_zeros, ones),
            builder.add(non_finites, strange),
            builder.select(is_first, at, first),
        ]

    done, *totals = loop(builder, pieces, [none, none, none, ir.Constant(I64, -1)], step)
    for slot, total in zip(slots, totals, strict=True):
        builder.store(total, pointer(builder, found, slot, I64), align=_WORD_BYTES)
    builder.ret(done)


def _trailing_zeros(builder: ir.IRBuilder, word: Any) -> Any:
    return builder.cttz(word, ir.Constant(ir.IntType(1), 1))  # the word is not 0


def _count(module: ir.Module, group: int) -> None:
    """`i64 count<group>(bits, words, bias)`: groups of `words` words that hold too many ones.

    All groups of a word are summed and compared at once. A field of `group` bits holds a count c <= group;
    adding the bias 2**(group - 1) - 1 - kept sets its top bit iff c > kept, and cannot carry out of it.
    """
    builder, (bits, words, bias) = define(module, f"count{group}", I64, [POINTER, I64, I64])
    fields = range(0, 64, group)
    low = ir.Constant(I64, sum(1 << shift for shift in fields))
    high = ir.Constant(I64, sum(1 << (shift + group - 1) for shift in fields))
    add = builder.mul(low, bias)

    def step(index: Any, carried: list[Any]) -> list[Any]:
        offset = builder.mul(index, ir.Constant(I64, _WORD_BYTES))
        word = builder.load(pointer(builder, bits, offset, I64), align=1)
        for size in (1, 2, 4, 8, 16, 32):
            if size < group:
                word = _add_neighbours(builder, word, size)
        over = builder.and_(builder.add(word, add), high)
        return [builder.add(carried[0], builder.ctpop(over))]

    (total,) = loop(builder, words, [ir.Constant(I64, 0)], step)
    builder.ret(total)


def _add_neighbours(builder: ir.IRBuilder, word: Any, size: int) -> Any:
    """Counts in fields of `size` bits -> their sums, two by two, in fields of twice the size."""
    keep = ir.Constant(I64, _ALL_ONES // ((1 << size) + 1))  # the lower half of every new field
    upper = builder.lshr(word, ir.Constant(I64, size))
    if size == 1:  # 2a + b - a
        return builder.sub(word, builder.and_(upper, keep))
    if size == 2:  # two counts of up to 2 do not fit into 2 bits, two of up to 4 fit into 4
        return builder.add(builder.and_(word, keep), builder.and_(upper, keep))
    return builder.and_(builder.add(word, upper), keep)
