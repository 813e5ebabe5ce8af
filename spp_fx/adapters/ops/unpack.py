"""Rows of a packed weight laid out densely: compiled loops where numba is at hand, torch expressions elsewhere."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spp_fx.adapters.ops.arrays import as_array
from spp_fx.adapters.ops.optional import optional

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def unpack_2_4(values: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Lay out 2:4 rows.

    Args:
        values: (rows, n/2), the two of each group in order.
        positions: (rows, ceil(n/8)) uint8, four bits a group, the even group in the low ones: the first
            value's lane in the lower two, the second's in the upper two.
        out: (rows, n) of values' dtype; every element is written.
    """
    kernels = _kernels(out)
    if kernels is not None:
        kernels.unpack_2_4(_integers(values), as_array(positions), _integers(out))
        return out
    rows, groups = len(out), out.shape[1] // 4
    nibbles = torch.stack((positions & 15, positions >> 4), dim=2).flatten(1)[:, :groups]
    lanes = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    out.view(rows, groups, 4).zero_().scatter_(2, lanes, values.view(rows, groups, 2))
    return out


def unpack_bitmask(values: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """Lay out rows of any pattern.

    Args:
        values: (nnz,), the non-zeros of these rows in row-major order.
        bits: (rows, ceil(n/8)) uint8, least significant bit first.
        out: (rows, n) of values' dtype; every element is written.
    """
    kernels = _kernels(out)
    if kernels is not None:
        kernels.unpack_bitmask(_integers(values), as_array(bits), _integers(out))
        return out
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits.unsqueeze(2) >> shifts) & 1).flatten(1)[:, : out.shape[1]].bool()
    return out.zero_().masked_scatter_(kept, values)


def _kernels(out: Tensor) -> ModuleType | None:
    return optional("_numba_kernels") if out.device.type == "cpu" else None


def _integers(tensor: Tensor) -> Any:
    """A CPU tensor as a numpy array of integers of its width."""
    return as_array(tensor.view(INTEGERS[tensor.element_size()]))
