"""How each element type spells zero and non-finite, read from its bits alone.

An element x of `itemsize` bytes, taken as an unsigned integer, is non-zero iff `x & magnitude != 0` and
non-finite iff `(x & magnitude) - non_finite_from`, wrapped, is below `non_finite_span`. No
floating-point unit is involved, so denormals-are-zero modes cannot change the answer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spp_fx.errors import FormatError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    """The bits of one element type; `name` is its spelling in a safetensors header."""

    name: str
    itemsize: int
    magnitude: int
    non_finite_from: int
    non_finite_span: int


def _ieee(name: str, itemsize: int, exponent_bits: int) -> ElementType:
    magnitude = (1 << (8 * itemsize - 1)) - 1
    mantissa_bits = 8 * itemsize - 1 - exponent_bits
    first = ((1 << exponent_bits) - 1) << mantissa_bits
    return ElementType(name, itemsize, magnitude, first, magnitude - first + 1)


def _integer(name: str, itemsize: int) -> ElementType:
    return ElementType(name, itemsize, (1 << 8 * itemsize) - 1, 0, 0)


# F8_E4M3 (the "fn" flavour) has no infinities and one NaN a sign; the "fnuz" types have no negative
# zero: 0x80 is their only NaN. F8_E8M0 is absent on purpose: it is an exponent and has no zero.
_TYPES = {
    kind.name: kind
    for kind in (
        _ieee("F64", 8, 11),
        _ieee("F32", 4, 8),
        _ieee("F16", 2, 5),
        _ieee("BF16", 2, 8),
        _ieee("F8_E5M2", 1, 5),
        ElementType("F8_E4M3", 1, 0x7F, 0x7F, 1),
        ElementType("F8_E5M2FNUZ", 1, 0xFF, 0x80, 1),
        ElementType("F8_E4M3FNUZ", 1, 0xFF, 0x80, 1),
        *(_integer(f"{sign}{8 * size}", size) for sign in "IU" for size in (1, 2, 4, 8)),
        _integer("BOOL", 1),
    )
}

_TORCH_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.uint8": "U8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.bool": "BOOL",
}


def element_type(dtype: "str | torch.dtype") -> ElementType:
    """The element type of a safetensors dtype name ('BF16') or a torch dtype.

    Raises:
        FormatError: a type whose zeros cannot be read from whole elements (packed 4-bit, complex, ...).
    """
    name = dtype if isinstance(dtype, str) else _TORCH_NAMES.get(str(dtype), "")
    if name not in _TYPES:
        raise FormatError(f"zeros cannot be counted in dtype {dtype}; supported: {', '.join(_TYPES)}")
    return _TYPES[name]
