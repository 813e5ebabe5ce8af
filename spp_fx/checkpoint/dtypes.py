"""The dtypes a safetensors file may name: their width in bits and the torch dtype that holds them.

torch is imported when one of its dtypes is asked for: headers are read and bytes copied without it.
"""

from functools import cache
from typing import TYPE_CHECKING

from spp_fx.errors import FormatError

if TYPE_CHECKING:
    import torch

# In the order of the reference implementation (smallest alignment first): a file lays its tensors out by
# this order descending, then by name.
_ORDER: tuple[tuple[str, int, str | None], ...] = (
    ("BOOL", 8, "bool"),
    ("F4", 4, "float4_e2m1fn_x2"),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
)

BITS: dict[str, int] = {name: bits for name, bits, _ in _ORDER}
"""Width of one element, in bits, by safetensors dtype name."""

LAYOUT_RANK: dict[str, int] = {name: rank for rank, (name, _, _) in enumerate(_ORDER)}
"""Place of a dtype in the layout order; files hold the highest rank first."""

_TORCH: dict[str, str] = {name: dtype for name, _, dtype in _ORDER if dtype is not None}


@cache
def _names() -> "dict[torch.dtype, str]":
    return {torch_dtype(name): name for name in _TORCH}


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name ('BF16' -> torch.bfloat16).

    Raises:
        FormatError: the name is unknown, or torch has no such dtype (F6_E2M3, F6_E3M2).
    """
    if name not in _TORCH:
        raise FormatError(f"dtype {name!r} cannot be held by torch; known: {', '.join(_TORCH)}")
    import torch

    return getattr(torch, _TORCH[name])


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype (torch.bfloat16 -> 'BF16').

    Raises:
        FormatError: safetensors cannot store the dtype (complex128, quantized and sub-byte integers).
    """
    if dtype not in _names():
        raise FormatError(f"{dtype} cannot be stored in a safetensors file; convert the tensor first")
    return _names()[dtype]


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape torch gives a stored tensor: F4 packs two elements of the last dimension in one.

    Raises:
        FormatError: an F4 tensor has no last dimension, or an odd one.
    """
    if dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise FormatError(f"an F4 tensor needs an even last dimension, found shape {list(shape)}")
    return (*shape[:-1], shape[-1] // 2)
