"""Four operations numba cannot spell, written in LLVM's own words.

LLVM lowers a comparison of 64 lanes whose result is read as a 64-bit integer to one or two mask
instructions on AVX-512 and to pack/movemask sequences elsewhere, so one definition serves every CPU.
Offsets are in bytes and need no alignment. numba's cache watches only the file of the kernel that calls
them: after an edit here, touch `_kernels.py`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LANES = 64
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, target: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    start = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [offset])
    return builder.bitcast(start, target.as_pointer())


def _broadcast(builder: Any, scalar: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    everywhere = ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, undefined, everywhere)


@intrinsic
def classify64(typing: Any, data: Any, offset: Any, magnitude: Any, start: Any, span: Any) -> Any:
    """64 elements of the array's own width -> (bits: non-zero, bits: non-finite), first element lowest."""
    signature = types.UniTuple(types.uint64, 2)(data, types.intp, types.uint64, types.uint64, types.uint64)
    width = data.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(width), _LANES)
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        element = vector.element
        scalars = [a if width == 64 else builder.trunc(a, element) for a in arguments[2:]]
        mask, first, length = (_broadcast(builder, scalar, vector) for scalar in scalars)
        magnitudes = builder.and_(builder.load(address, align=1), mask)
        non_zero = builder.icmp_unsigned("!=", magnitudes, ir.Constant(vector, [0] * _LANES))
        strange = builder.icmp_unsigned("<", builder.sub(magnitudes, first), length)
        return cgutils.pack_array(builder, [builder.bitcast(non_zero, _I64), builder.bitcast(strange, _I64)])

    return signature, generate


@intrinsic
def load_word(typing: Any, data: Any, offset: Any) -> Any:
    """Eight bytes as one little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _I64)
        return builder.load(address, align=1)

    return types.uint64(data, types.intp), generate


@intrinsic
def store_word(typing: Any, data: Any, offset: Any, word: Any) -> Any:
    """One uint64 as eight little-endian bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _I64)
        builder.store(arguments[2], address, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), generate


@intrinsic
def popcount(typing: Any, word: Any) -> Any:
    """Ones in a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate
