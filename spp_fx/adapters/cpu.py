"""Compiled loops for the CPU: unpacking, SPP's tile and pullback over a bfloat16 W, and SPP's fold.

Elements travel as integers of their width, since numba has no bfloat16. Rows are taken as slices before
they are run along: LLVM then knows that an index is not negative, and uses vectors.

Tile and pullback unpack and scale a row while it lies in the first cache. They run on one core, and need a third of
the time that torch's expressions take on two. In float32 it was the other way round: twice the bytes, which one core
cannot move as fast as two.

The fold computes every value in float64 in the order of the definition and rounds it once, to nearest even, by
adding to its bits: half a unit less one, and one more where the last kept bit is odd. What is subnormal in the stored
dtype is added to the power of two whose own unit is the least subnormal, which rounds it to that unit.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false, reportMissingTypeStubs=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from spp_fx.compiled import compiled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spp_fx.adapters.op import AdaptedWeight
    from spp_fx.adapters.spp import SPP

FEW_THREADS = 6
"""With more, torch's expressions are taken: three times two cores' worth, reckoned from two, not measured."""
NO_INDEX, NO_OFFSETS = np.zeros((1, 1), np.uint8), np.zeros(1, np.int64)

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
def spread_2_4(values, index, out):
    """A 2:4 row, (n/2,) values and ceil(n/8) bytes of positions, dense in out (n,)."""
    out[:] = 0
    for group in range(out.shape[0] // 4):
        nibble = index[group >> 1] >> ((group & 1) << 2)
        out[4 * group + (nibble & 3)] = values[2 * group]
        out[4 * group + ((nibble >> 2) & 3)] = values[2 * group + 1]


@njit(inline="always")
def spread_bitmask(values, index, out):
    """A row of any pattern, dense in out (n,); values begin with its non-zeros, index are ceil(n/8) bytes of bits.

    Returns how many non-zeros it has.
    """
    position = 0
    if values.shape[0] == 0:
        out[:] = 0
        return position
    for c in range(out.shape[0]):
        kept = np.int64((index[c >> 3] >> (c & 7)) & 1)
        out[c] = values[min(position, values.shape[0] - 1)] & -kept  # no branch: half of them would be missed
        position += kept
    return position


@compiled
def unpack_2_4(values, positions, out):
    """`rows.unpack_2_4` on integers."""
    for i in range(out.shape[0]):
        spread_2_4(values[i], positions[i], out[i])


@compiled
def unpack_bitmask(values, bits, out):
    """`rows.unpack_bitmask` on integers."""
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
def spp_tile(storage, values, index, offsets, alpha, beta, first, height, scale, base, buffer, out):
    """Rows of base * W + s * W * beta * repeat(alpha)."""
    for i in range(out.shape[0]):
        row = row_of(storage, values, index, offsets, i, buffer)
        factor, shared, target = beta[first + i, 0] * scale, alpha[(first + i) // height], out[i]
        for c in range(row.shape[0]):
            w = widen(row[c])
            target[c] = narrow(base * w + w * (factor * shared[c]), target[c])


# Sums in lanes need leave to be reordered; each row is still summed the same way every time.
@partial(compiled, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def spp_pullback(
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


def takes(adapted: AdaptedWeight, other: torch.dtype) -> bool:
    """Whether the loops of SPP have these types, and are the faster; `other` is that of W' or of G."""
    import torch

    return (
        torch.get_num_threads() <= FEW_THREADS
        and adapted.rows.dtype == torch.bfloat16
        and all(factor.dtype == torch.float32 for factor in adapted.factors.values())
        and other in (torch.bfloat16, torch.float32)
    )


def tile(adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
    """`Kernels.tile` of SPP for types that `takes` takes."""
    from spp_fx.adapters.rows import as_array

    _check(adapted, out, start, stop)
    factors, scale, buffer = _spp(adapted)
    spp_tile(
        *_storage(adapted, start, stop), *factors, start, adapted.group, scale, np.float32(base), buffer,
        as_array(out),
    )  # fmt: skip


def pullback(adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]) -> None:
    """`Kernels.pullback` of SPP for types that `takes` takes."""
    from spp_fx.adapters.rows import as_array

    _check(adapted, grad, start, stop)
    factors, scale, buffer = _spp(adapted)
    spp_pullback(
        *_storage(adapted, start, stop), *factors, start, adapted.group, scale, buffer,
        as_array(grad.contiguous()), as_array(grads["spp_alpha"]), as_array(grads["spp_beta"]),
    )  # fmt: skip


def _check(adapted: AdaptedWeight, other: Tensor, start: int, stop: int) -> None:
    """Compiled loops do not look where they write."""
    m, n = adapted.rows.shape
    if other.shape != (stop - start, n) or not 0 <= start <= stop <= m:
        raise ValueError(f"{tuple(other.shape)} are no rows {start} to {stop} of a weight {(m, n)}")


def _spp(adapted: AdaptedWeight) -> tuple[tuple[Any, Any], np.float32, Any]:
    """alpha and beta, s, and a buffer for one row of W."""
    from spp_fx.adapters.rows import as_array

    alpha, beta = (as_array(adapted.factors[key].contiguous()) for key in ("spp_alpha", "spp_beta"))
    return (alpha, beta), np.float32(cast("SPP", adapted.method).scale), np.empty(alpha.shape[1], np.uint16)


def _storage(adapted: AdaptedWeight, start: int, stop: int) -> tuple[int, Any, Any, Any]:
    """Kind, values, index and offsets of rows start..stop."""
    from spp_fx.adapters.rows import PackedRows2of4, PackedRowsBitmask, as_array

    rows = adapted.rows
    if isinstance(rows, PackedRows2of4):
        values, index = rows.values[start:stop], rows.positions[start:stop]
        return TWO_OF_FOUR, as_array(values.reshape(-1)), as_array(index), NO_OFFSETS
    if isinstance(rows, PackedRowsBitmask):
        index, offsets = as_array(rows.bits[start:stop]), as_array(rows.offsets[start : stop + 1])
        return BITMASK, as_array(rows.values), index, offsets
    return DENSE, as_array(rows.take(start, stop).reshape(-1)), NO_INDEX, NO_OFFSETS


def _bitcast(argument: Any, result: Any, target: ir.Type) -> Callable[..., Any]:
    """A function for kernels that reads the bits of a number as another type of the same width."""

    def typed(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], target)

        return result(argument), generate

    return intrinsic(typed)


_float32_of = _bitcast(types.uint32, types.float32, ir.FloatType())
_bits_of = _bitcast(types.float64, types.uint64, ir.IntType(64))

_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64
_ONE = _U64(1)
_MAGNITUDE = _U64(0x7FFFFFFFFFFFFFFF)
_TWO_112 = np.float32(2.0**112)  # from float32's exponent bias to float16's


@compiled
def fold_bfloat16(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    changed = zero = broken = np.int64(0)
    for row in range(words.shape[0]):
        factor, line, source, target = scaled[row], alpha[(start + row) // height], words[row], out[row]
        for column in range(source.shape[0]):
            word = source[column]
            weight = np.float64(_float32_of(_U32(word) << _U32(16)))
            exact = weight + weight * (factor * line[column])
            bits = _bits_of(exact)
            magnitude = bits & _MAGNITUDE
            normal = (magnitude + _U64((1 << 44) - 1) + ((magnitude >> _U64(45)) & _ONE)) >> _U64(45)
            small = _bits_of(np.abs(exact) + 2.0**-81) - _U64((1023 - 81) << 52)
            value = small if magnitude < _U64((1023 - 126) << 52) else normal - _U64((1023 - 127) << 7)
            kept = (word & _U16(0x7FFF)) != _U16(0)
            rounded = _U16(value) | _U16((bits >> _U64(48)) & _U64(0x8000))
            target[column] = rounded if kept else word
            changed += np.int64(kept & (rounded != word))
            zero += np.int64(kept & (value == _U64(0)))
            broken += np.int64(value >= _U64(0x7F80))
    return changed, zero, broken


@compiled
def fold_float16(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    changed = zero = broken = np.int64(0)
    for row in range(words.shape[0]):
        factor, line, source, target = scaled[row], alpha[(start + row) // height], words[row], out[row]
        for column in range(source.shape[0]):
            word = source[column]
            stored = word & _U16(0x7FFF)
            weight = np.float64(_float32_of(_U32(stored) << _U32(13)) * _TWO_112)
            weight = -weight if stored != word else weight
            exact = weight + weight * (factor * line[column])
            bits = _bits_of(exact)
            magnitude = bits & _MAGNITUDE
            normal = (magnitude + _U64((1 << 41) - 1) + ((magnitude >> _U64(42)) & _ONE)) >> _U64(42)
            small = _bits_of(np.abs(exact) + 2.0**28) - _U64((1023 + 28) << 52)
            value = small if magnitude < _U64((1023 - 14) << 52) else normal - _U64((1023 - 15) << 10)
            kept = stored != _U16(0)
            rounded = _U16(value) | _U16((bits >> _U64(48)) & _U64(0x8000))
            target[column] = rounded if kept else word
            changed += np.int64(kept & (rounded != word))
            zero += np.int64(kept & (value == _U64(0)))
            broken += np.int64((value >= _U64(0x7C00)) | (stored >= _U16(0x7C00)))
    return changed, zero, broken


@compiled
def fold_wide(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    """float32 and float64 arrays: the processor's own rounding."""
    changed = zero = broken = np.int64(0)
    for row in range(words.shape[0]):
        factor, line, source, target = scaled[row], alpha[(start + row) // height], words[row], out[row]
        for column in range(source.shape[0]):
            word = source[column]
            weight = np.float64(word)
            target[column] = weight + weight * (factor * line[column])
            value = target[column]
            kept = word != 0.0
            target[column] = value if kept else word
            changed += np.int64(kept & (value != word))
            zero += np.int64(kept & (value == 0.0))
            broken += np.int64(not np.isfinite(value))
    return changed, zero, broken
