"""Compiled loops over the rows of frozen weights: unpacking, and the two passes over a bfloat16 W.

Elements travel as integers of their width, since numba has no bfloat16. Rows are taken as slices before
they are run along: LLVM then knows that an index is not negative, and uses vectors.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false, reportMissingTypeStubs=false, reportCallIssue=false

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from spp_fx.compiled import compiled

DENSE, TWO_OF_FOUR, BITMASK = 0, 1, 2
I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def widen(typing, element):
    """A bfloat16 (uint16) as float32; a float32 as it is."""

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        if signature.args[0] == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)

    return types.float32(element), generate


@intrinsic
def narrow(typing, value, like):
    """A float32 in the type of `like`: as it is, or as bfloat16 (uint16), to nearest and ties to even."""

    def generate(context, builder, signature, arguments):
        number, _ = arguments
        if signature.return_type == types.float32:
            return number
        bits = builder.bitcast(number, I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        upper = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        nan = builder.fcmp_unordered("uno", number, number)
        return builder.select(nan, I16(0x7FC0), builder.trunc(upper, I16))

    return like(types.float32, like), generate


@njit(inline="always")
def spread_2_4(values, places, out):
    """A 2:4 row, (n/2,) values and ceil(n/8) bytes of positions, dense in out (n,)."""
    out[:] = 0
    for group in range(out.shape[0] // 4):
        nibble = places[group >> 1] >> ((group & 1) << 2)
        out[4 * group + (nibble & 3)] = values[2 * group]
        out[4 * group + ((nibble >> 2) & 3)] = values[2 * group + 1]


@njit(inline="always")
def spread_bitmask(values, places, out):
    """A row of any pattern, dense in out (n,); values begin with its non-zeros, places are ceil(n/8) bytes of bits.

    Returns how many non-zeros it has.
    """
    position = 0
    if values.shape[0] == 0:
        out[:] = 0
        return position
    for c in range(out.shape[0]):
        kept = np.int64((places[c >> 3] >> (c & 7)) & 1)
        out[c] = values[min(position, values.shape[0] - 1)] & -kept  # no branch: half of them would be missed
        position += kept
    return position


@compiled
def unpack_2_4(values, positions, out):
    """`unpack.unpack_2_4` on integers."""
    for i in range(out.shape[0]):
        spread_2_4(values[i], positions[i], out[i])


@compiled
def unpack_bitmask(values, bits, out):
    """`unpack.unpack_bitmask` on integers."""
    position = 0
    for i in range(out.shape[0]):
        position += spread_bitmask(values[position:], bits[i], out[i])


@njit(inline="always")
def row_of(storage, values, index, offsets, i, buffer):
    """Row i of what is stored: a part of it where it is dense, else laid out in the buffer."""
    n = buffer.shape[0]
    if storage == DENSE:
        return values[i * n : (i + 1) * n]
    if storage == TWO_OF_FOUR:
        spread_2_4(values[i * (n // 2) : (i + 1) * (n // 2)], index[i], buffer)
    else:
        spread_bitmask(values[offsets[i] :], index[i], buffer)
    return buffer


@partial(compiled, error_model="numpy")
def build(storage, values, index, offsets, alpha, beta, first, height, scale, base, buffer, out):
    """Rows of base * W + s * W * beta * repeat(alpha)."""
    for i in range(out.shape[0]):
        row = row_of(storage, values, index, offsets, i, buffer)
        factor, shared, target = beta[first + i, 0] * scale, alpha[(first + i) // height], out[i]
        for c in range(row.shape[0]):
            w = widen(row[c])
            target[c] = narrow(base * w + w * (factor * shared[c]), target[c])


# Sums in lanes need leave to be reordered; each row is still summed the same way every time.
@partial(compiled, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def reduce_gradient(
    storage, values, index, offsets, alpha, beta, first, height, scale, buffer, g, dalpha, dbeta
):
    """dbeta_i = s sum_c (G W)_ic alpha_jc, written, and dalpha_jc = s sum_i beta_i (G W)_ic, added to."""
    for i in range(g.shape[0]):
        row = row_of(storage, values, index, offsets, i, buffer)
        j, gradient = (first + i) // height, g[i]
        factor, shared, target = beta[first + i, 0] * scale, alpha[j], dalpha[j]
        total = np.float32(0)
        for c in range(row.shape[0]):
            product = widen(gradient[c]) * widen(row[c])
            target[c] += factor * product
            total += product * shared[c]
        dbeta[first + i, 0] = total * scale
