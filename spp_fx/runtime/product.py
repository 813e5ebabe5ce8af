"""Whether products with a packed weight are those with the dense one.

Two looks, on the GPU that is to be trusted. Unit vectors first: each product is one column of the weight,
1 w and zeros, which no accumulation order can round, so for 16-bit types it must be the weight to the bit,
and one misplaced entry shows. Then random inputs of some token counts, padded ones among them, held to
the error bound of an inner product (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5):

    |y - x w| <= u |x w| + n 2^-23 |x| |w|

with n terms, u the spacing of the output type (a library may truncate where PyTorch rounds), and 2^-23 for
accumulation in float32 without rounding to nearest. Products of two 16-bit numbers are exact in float32.
float32 weights run on tensor cores as TF32, ten bits of mantissa: each operand is off by up to 2^-10.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

TOKENS: Final = (1, 16, 100)
"""Token counts of the random inputs: libraries pad to multiples of 8 or 16."""
UNIT_VECTORS: Final = 1024
"""How many are multiplied at a time."""
ROWS: Final = 1024
"""Rows of the weight that are held in float64 at a time."""
ACCUMULATION: Final = 2.0**-23
TF32: Final = 2.0**-10

Multiply = Callable[[Tensor], Tensor]


def product_fault(multiply: Multiply, dense: Tensor) -> str | None:
    """The first difference between a library's products and those of the dense weight, None where they agree.

    Args:
        multiply: x (tokens, in) -> (tokens, out), both of dense's dtype and on its device.
        dense: (out, in) float16, bfloat16 or float32, finite.
    """
    return _unit_vectors(multiply, dense) or next(
        (fault for tokens in TOKENS if (fault := _random_input(multiply, dense, tokens))), None
    )


def _unit_vectors(multiply: Multiply, dense: Tensor) -> str | None:
    m, k = dense.shape
    relative = TF32 if dense.dtype == torch.float32 else 0.0
    least = torch.finfo(torch.float32).tiny  # what it accumulates in; a library may flush what is smaller
    for start in range(0, k, UNIT_VECTORS):
        stop = min(start + UNIT_VECTORS, k)
        x = torch.zeros(stop - start, k, dtype=dense.dtype, device=dense.device)
        x[:, start:stop].fill_diagonal_(1)
        y = multiply(x)
        if tuple(y.shape) != (stop - start, m):
            return _wrong_shape(y, (stop - start, m))
        expected = dense[:, start:stop].t().float()
        off = (y.float() - expected).abs() > relative * expected.abs() + least
        # A comparison with NaN is false.
        off |= y.isnan()
        if bool(off.any()):
            column, row = (int(i) for i in off.nonzero()[0])
            return (
                f"times a unit vector it gives {float(y[column, row])} at row {row}, column {start + column}, "
                f"the weight has {float(dense[row, start + column])} "
                f"({int(off.sum())} of {off.numel()} entries differ)"
            )
    return None


def _random_input(multiply: Multiply, dense: Tensor, tokens: int) -> str | None:
    m, k = dense.shape
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))
    x = x.to(device=dense.device, dtype=dense.dtype)
    y = multiply(x)
    if tuple(y.shape) != (tokens, m):
        return _wrong_shape(y, (tokens, m))
    inputs = k * ACCUMULATION + (2 * TF32 if dense.dtype == torch.float32 else 0.0)
    output = torch.finfo(dense.dtype).eps
    exact_x = x.double()
    for start in range(0, m, ROWS):
        rows = dense[start : start + ROWS].double()
        exact, size = exact_x @ rows.t(), exact_x.abs() @ rows.abs().t()
        error = (y[:, start : start + ROWS].double() - exact).abs()
        bound = output * exact.abs() + inputs * size
        within = error <= bound + torch.finfo(dense.dtype).tiny
        if not bool(within.all()):
            token, row = (int(i) for i in (~within).nonzero()[0])
            return (
                f"with {tokens} tokens, row {start + row} gives {float(y[token, start + row]):.6g}, the dense "
                f"product is {float(exact[token, row]):.6g} (at most {float(bound[token, row]):.2g} off)"
            )
    return None


def _wrong_shape(y: Tensor, shape: tuple[int, int]) -> str:
    return f"a product has shape {list(y.shape)}, expected {list(shape)}"
