"""Two operations numba cannot spell, written in LLVM's own words.

Offsets are in bytes and need no alignment. numba's cache watches only the file of the kernel that calls
them: after an edit here, touch `_kernels.py`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, target: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    start = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [offset])
    return builder.bitcast(start, target.as_pointer())


@intrinsic
def load_word(typing: Any, data: Any, offset: Any) -> Any:
    """Eight bytes as one little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _I64)
        return builder.load(address, align=1)

    return types.uint64(data, types.intp), generate


@intrinsic
def popcount(typing: Any, word: Any) -> Any:
    """Ones in a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate
