"""SPP's fold, compiled: `fold_rows` for W + W * (s * beta * alpha), bit for bit.

Every value is computed in float64 in the order of the definition and rounded once, to nearest even, by adding
to its bits: half a unit less one, and one more where the last kept bit is odd. What is subnormal in the stored
dtype is added to the power of two whose own unit is the least subnormal, which rounds it to that unit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spp_fx.compiled import compiled


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
def bfloat16(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    changed = gone = strange = np.int64(0)
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
            gone += np.int64(kept & (value == _U64(0)))
            strange += np.int64(value >= _U64(0x7F80))
    return changed, gone, strange


@compiled
def float16(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    changed = gone = strange = np.int64(0)
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
            gone += np.int64(kept & (value == _U64(0)))
            strange += np.int64((value >= _U64(0x7C00)) | (stored >= _U16(0x7C00)))
    return changed, gone, strange


@compiled
def wide(words: Any, alpha: Any, scaled: Any, height: int, start: int, out: Any) -> Any:
    """float32 and float64 arrays: the processor's own rounding."""
    changed = gone = strange = np.int64(0)
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
            gone += np.int64(kept & (value == 0.0))
            strange += np.int64(not np.isfinite(value))
    return changed, gone, strange
