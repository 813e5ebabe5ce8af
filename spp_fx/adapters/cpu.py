"""Compiled loops for the CPU: tile and pullback of SPP over a bfloat16 W, and the fold of every product.

Elements are integers of their width, since numba has no bfloat16. Loops run along slices of rows: LLVM then
knows that an index is not negative, and uses vectors.

Tile and pullback unpack and scale a row while it lies in the first cache. They run on one core, and take a third of
the time of torch's expressions on two. In float32, with twice the bytes, torch on two cores is faster.

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
from spp_fx.sparsity.packing_kernels import expand_row, spread_2_4

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spp_fx.adapters.op import AdaptedWeight
    from spp_fx.adapters.spp import SPP

FEW_THREADS = 6
"""With more threads torch's expressions are faster: an estimate from a measurement on two cores."""
NO_INDEX, NO_OFFSETS = np.zeros((1, 1), np.uint8), np.zeros(1, np.int64)

DENSE, TWO_OF_FOUR, BITMASK = 0, 1, 2
I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def widen(typing, element):
    """A bfloat16 (uint16) or the bits of a float32 (uint32) as float32; a float32 as it is."""

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        if signature.args[0] == types.float32:
            return value
        if signature.args[0] == types.uint32:
            return builder.bitcast(value, F32)
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
def row_of(storage, values, index, offsets, i, nibbles, buffer):
    """Row i of what is stored: a part of it where it is dense, else laid out in the buffer."""
    n = buffer.shape[0]
    if storage == DENSE:
        return values[i * n : (i + 1) * n]
    if storage == TWO_OF_FOUR:
        spread_2_4(values[i * (n // 2) : (i + 1) * (n // 2)], index[i], nibbles, buffer)
    else:
        expand_row(index[i], values[offsets[i] :], buffer)
    return buffer


@partial(compiled, error_model="numpy")
def spp_tile(storage, values, index, offsets, alpha, beta, first, height, scale, base, buffer, out):
    """Rows of base * W + s * W * beta * repeat(alpha)."""
    nibbles = np.empty(2 * index.shape[1], np.uint8)
    for i in range(out.shape[0]):
        row = row_of(storage, values, index, offsets, i, nibbles, buffer)
        factor, shared, target = beta[first + i, 0] * scale, alpha[(first + i) // height], out[i]
        for c in range(row.shape[0]):
            w = widen(row[c])
            target[c] = narrow(base * w + w * (factor * shared[c]), target[c])


# Vectorized sums are in another order than the loop; each row is still summed in the same order every time.
@partial(compiled, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def spp_pullback(
    storage, values, index, offsets, alpha, beta, first, height, scale, buffer, g, dalpha, dbeta
):
    """dbeta_i = s sum_c (G W)_ic alpha_jc and dalpha_jc = s sum_i beta_i (G W)_ic, added to."""
    nibbles = np.empty(2 * index.shape[1], np.uint8)
    for i in range(g.shape[0]):
        row = row_of(storage, values, index, offsets, i, nibbles, buffer)
        j, gradient = (first + i) // height, g[i]
        factor, shared, target = beta[first + i, 0] * scale, alpha[j], dalpha[j]
        total = np.float32(0)
        for c in range(row.shape[0]):
            product = widen(gradient[c]) * widen(row[c])
            target[c] += factor * product
            total += product * shared[c]
        dbeta[first + i, 0] += total * scale


def takes(adapted: AdaptedWeight, other: torch.dtype) -> bool:
    """Whether the loops take these types, and are faster than torch; `other` is the dtype of W' or of G."""
    import torch

    return (
        torch.get_num_threads() <= FEW_THREADS
        and adapted.rows.dtype == torch.bfloat16
        and all(factor.dtype == torch.float32 for factor in adapted.factors.values())
        and other in (torch.bfloat16, torch.float32)
    )


def tile(adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
    """`Kernels.tile` of SPP for types that `takes` takes."""
    from spp_fx.sparsity.packing import as_array

    check_range(adapted, out, start, stop)
    factors, scale, buffer = _spp(adapted)
    spp_tile(
        *storage_of(adapted, start, stop), *factors, start, adapted.group, scale, np.float32(base), buffer,
        as_array(out),
    )  # fmt: skip


def pullback(adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]) -> None:
    """`Kernels.pullback` of SPP for types that `takes` takes."""
    from spp_fx.sparsity.packing import as_array

    check_range(adapted, grad, start, stop)
    factors, scale, buffer = _spp(adapted)
    spp_pullback(
        *storage_of(adapted, start, stop), *factors, start, adapted.group, scale, buffer,
        as_array(grad.contiguous()), as_array(grads["spp_alpha"]), as_array(grads["spp_beta"]),
    )  # fmt: skip


def check_range(adapted: AdaptedWeight, other: Tensor, start: int, stop: int) -> None:
    """ValueError unless the shapes fit: compiled loops do not check bounds."""
    m, n = adapted.rows.shape
    if other.shape != (stop - start, n) or not 0 <= start <= stop <= m:
        raise ValueError(
            f"expected rows {start} to {stop} of a weight {(m, n)}, got a matrix of shape {tuple(other.shape)}"
        )


def _spp(adapted: AdaptedWeight) -> tuple[tuple[Any, Any], np.float32, Any]:
    """alpha and beta, s, and a buffer for one row of W."""
    from spp_fx.sparsity.packing import as_array

    alpha, beta = (as_array(adapted.factors[key].contiguous()) for key in ("spp_alpha", "spp_beta"))
    return (alpha, beta), np.float32(cast("SPP", adapted.method).scale), row_buffer(adapted)


def row_buffer(adapted: AdaptedWeight) -> Any:
    """A buffer for the bits of one row of W."""
    return np.empty(adapted.rows.shape[1], np.dtype(f"u{adapted.rows.dtype.itemsize}"))


def storage_of(adapted: AdaptedWeight, start: int, stop: int) -> tuple[int, Any, Any, Any]:
    """Kind, values as bits, index and offsets of rows start..stop."""
    from spp_fx.adapters.rows import PackedRows2of4, PackedRowsBitmask
    from spp_fx.sparsity.packing import as_array

    def bits(values: Tensor) -> Any:
        array = as_array(values)
        return array.view(f"u{array.itemsize}")

    rows = adapted.rows
    if isinstance(rows, PackedRows2of4):
        values, index = rows.values[start:stop], rows.positions[start:stop]
        return TWO_OF_FOUR, bits(values.reshape(-1)), as_array(index), NO_OFFSETS
    if isinstance(rows, PackedRowsBitmask):
        index, offsets = as_array(rows.bits[start:stop]), as_array(rows.offsets[start : stop + 1])
        return BITMASK, bits(rows.values), index, offsets
    return DENSE, bits(rows.take(start, stop).reshape(-1)), NO_INDEX, NO_OFFSETS


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
_MAGNITUDE = _U64(0x7FFFFFFFFFFFFFFF)


@njit(inline="always")
def half_value(word, mantissa, bias):
    """The value of a word of 16 bits in float64, given how many of them its mantissa takes, and its exponent's bias."""
    stored = word & _U16(0x7FFF)
    weight = np.float64(_float32_of(_U32(stored) << _U32(23 - mantissa))) * np.float64(2.0 ** (127 - bias))
    return -weight if stored != word else weight


@njit(inline="always")
def round_half(exact, word, mantissa, bias):
    """A float64 rounded to 16 bits, or `word` where that is zero; whether it changed, is zero, is not finite."""
    infinity = _U16(0x8000) - _U16(1 << mantissa)
    cut = _U64(52 - mantissa)  # bits of a float64 below the last kept one
    half = (_U64(1) << (cut - _U64(1))) - _U64(1)
    smallest = _U64(1024 - bias) << _U64(52)  # the bits of the smallest normal number
    offset = _U64(1023 - bias) << _U64(mantissa)
    unit_bits = _U64(1023 + 53 - bias - mantissa) << _U64(52)
    unit = 2.0 ** (53 - bias - mantissa)  # its own unit in the last place is the least subnormal
    stored = word & _U16(0x7FFF)
    bits = _bits_of(exact)
    magnitude = bits & _MAGNITUDE
    normal = (magnitude + half + ((magnitude >> cut) & _U64(1))) >> cut
    small = _bits_of(np.abs(exact) + unit) - unit_bits
    value = small if magnitude < smallest else normal - offset
    kept = stored != _U16(0)
    rounded = _U16(value) | _U16((bits >> _U64(48)) & _U64(0x8000))
    changed, zero = np.int64(kept & (rounded != word)), np.int64(kept & (value == _U64(0)))
    return rounded if kept else word, changed, zero, np.int64((value >= infinity) | (stored >= infinity))


@njit(inline="always")
def _fold_half(words, lines, scaled, height, start, offset, by_weight, out, mantissa, bias):
    changed = zero = broken = np.int64(0)
    for row in range(words.shape[0]):
        factor, line, source, target = scaled[row], lines[(start + row) // height], words[row], out[row]
        for column in range(source.shape[0]):
            word = source[column]
            weight = half_value(word, mantissa, bias)
            exact = weight + (weight if by_weight else 1.0) * (factor * line[column] + offset)
            target[column], moved, vanished, invalid = round_half(exact, word, mantissa, bias)
            changed += moved
            zero += vanished
            broken += invalid
    return changed, zero, broken


@compiled
def fold_bfloat16(words, lines, scaled, height, start, offset, by_weight, out):
    """W + M * (f line + offset) with M = W or 1, a line for each `height` rows and a factor f for each; zeros stay.

    SPP's lines are alpha and its factors s beta; those of a low-rank update are B A, a line for each row, and s.
    """
    return _fold_half(words, lines, scaled, height, start, offset, by_weight, out, 7, 127)


@compiled
def fold_float16(words, lines, scaled, height, start, offset, by_weight, out):
    return _fold_half(words, lines, scaled, height, start, offset, by_weight, out, 10, 15)


@compiled
def fold_wide(words, lines, scaled, height, start, offset, by_weight, out):
    """float32 and float64 arrays: the processor's own rounding."""
    changed = zero = broken = np.int64(0)
    for row in range(words.shape[0]):
        factor, line, source, target = scaled[row], lines[(start + row) // height], words[row], out[row]
        for column in range(source.shape[0]):
            word = source[column]
            weight = np.float64(word)
            target[column] = weight + (weight if by_weight else 1.0) * (factor * line[column] + offset)
            value = target[column]
            kept = word != 0.0
            target[column] = value if kept else word
            changed += np.int64(kept & (value != word))
            zero += np.int64(kept & (value == 0.0))
            broken += np.int64(not np.isfinite(value))
    return changed, zero, broken


FOLDS = {"BF16": fold_bfloat16, "F16": fold_float16, "F32": fold_wide, "F64": fold_wide}
"""By the dtype of the stored numbers, as safetensors spells it."""
