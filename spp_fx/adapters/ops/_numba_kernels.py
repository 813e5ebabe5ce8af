"""The two passes over W as compiled loops over one row after the other.

A row is laid out in a buffer that stays in the first cache, whatever W is stored as. bfloat16, which numba
does not have, travels as unsigned integers of 16 bits. Rows are taken as slices before they are run along:
LLVM then knows that an index is not negative, and uses vectors.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false, reportMissingTypeStubs=false, reportCallIssue=false

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from spp_fx.sparsity._compile import compiled

DENSE, TWO_OF_FOUR, BITMASK = 0, 1, 2


@intrinsic
def float_of(typing, bits):
    """The float32 whose bits these are."""
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


@intrinsic
def bits_of(typing, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


def widen(element):
    """An element as it is reckoned with: a bfloat16 as float32."""
    raise NotImplementedError


def store(array, place, value):
    """Write a value, rounded to nearest, ties to even, where the array holds bfloat16."""
    raise NotImplementedError


@overload(widen, inline="always")
def _(element):
    if element == types.uint16:
        return lambda element: float_of(np.uint32(element) << np.uint32(16))
    return lambda element: element


@overload(store, inline="always")
def _(array, place, value):
    if array.dtype != types.uint16:

        def as_it_is(array, place, value):
            array[place] = value

        return as_it_is

    def rounded(array, place, value):
        bits = bits_of(value)
        upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        array[place] = np.uint16(upper) if value == value else np.uint16(0x7FC0)

    return rounded


@njit(inline="always")
def load_row(storage, values, index, offsets, i, out):
    """Row i of what is stored, dense, in out."""
    n = out.shape[0]
    if storage == DENSE:
        source = values[i * n : (i + 1) * n]
        for c in range(n):
            out[c] = widen(source[c])
    elif storage == TWO_OF_FOUR:
        source, places = values[i * (n // 2) : (i + 1) * (n // 2)], index[i]
        out[:] = 0
        for group in range(n // 4):
            nibble = places[group >> 1] >> ((group & 1) << 2)
            out[4 * group + (nibble & 3)] = widen(source[2 * group])
            out[4 * group + ((nibble >> 2) & 3)] = widen(source[2 * group + 1])
    elif offsets[i] == offsets[i + 1]:
        out[:] = 0
    else:
        source, places, position, zero = values[offsets[i] : offsets[i + 1]], index[i], 0, out.dtype.type(0)
        for c in range(n):
            kept = (places[c >> 3] >> (c & 7)) & 1
            value = widen(source[min(position, source.shape[0] - 1)])
            out[c] = value if kept else zero  # no branch: half of them would be missed
            position += kept


@partial(compiled, error_model="numpy")
def build(storage, values, index, offsets, alpha, beta, first, height, scale, base, row, out):
    """Rows of base * W + s * W * beta * repeat(alpha); row is a buffer of n numbers of alpha's type."""
    for i in range(out.shape[0]):
        load_row(storage, values, index, offsets, i, row)
        factor, shared, target = beta[first + i, 0] * scale, alpha[(first + i) // height], out[i]
        for c in range(row.shape[0]):
            store(target, c, base * row[c] + row[c] * (factor * shared[c]))


# Sums in lanes need leave to be reordered; each row is still summed the same way every time.
@partial(compiled, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def reduce_gradient(
    storage, values, index, offsets, alpha, beta, first, height, scale, row, g, dalpha, dbeta
):
    """dbeta_i = s sum_c (G W)_ic alpha_jc, written, and dalpha_jc = s sum_i beta_i (G W)_ic, added to."""
    for i in range(g.shape[0]):
        load_row(storage, values, index, offsets, i, row)
        j, gradient = (first + i) // height, g[i]
        factor, shared, target = beta[first + i, 0] * scale, alpha[j], dalpha[j]
        total = row.dtype.type(0)
        for c in range(row.shape[0]):
            product = widen(gradient[c]) * row[c]
            target[c] += factor * product
            total += product * shared[c]
        dbeta[first + i, 0] = total * scale
