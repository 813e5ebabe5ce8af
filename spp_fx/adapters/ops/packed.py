"""A frozen weight kept packed: 2:4 as values and two-bit positions, any other pattern as values and a bit mask.

In bfloat16 a 2:4 weight takes 0.5625 of its dense bytes. Rows are laid out where a kernel asks for them,
tile by tile, so the dense weight never exists as a whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.adapters.ops import spp_fused
from spp_fx.adapters.ops.linear_op import linear_op
from spp_fx.adapters.ops.packed_rows import PackedRows2of4, PackedRowsBitmask
from spp_fx.adapters.ops.rows import Rows


def pack_2_4(weight: Tensor) -> dict[str, Tensor]:
    """A 2:4 weight (m, n) as `values` and `positions`; a group with less than two takes a zero along."""
    m, n = weight.shape
    groups = weight.reshape(m, n // 4, 4)
    # Stable: the non-zeros first, each kind in order of position; then the two chosen in order.
    order = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :2].sort(dim=2).values
    values = groups.gather(2, order).reshape(m, n // 2)
    nibbles = (order[:, :, 0] | order[:, :, 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.cat((nibbles, nibbles.new_zeros(m, 1)), dim=1)
    return {
        "values": values.contiguous(),
        "positions": (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous(),
    }


def pack_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """Any weight (m, n) as `values`, `bits` and `offsets`."""
    m, n = weight.shape
    kept = weight != 0
    padded = torch.zeros(m, -(-n // 8) * 8, dtype=torch.uint8, device=weight.device)
    padded[:, :n] = kept
    powers = (2 ** torch.arange(8, device=weight.device)).to(torch.uint8)
    bits = (padded.view(m, -1, 8) * powers).sum(2, dtype=torch.uint8)
    offsets = torch.zeros(m + 1, dtype=torch.int64, device=weight.device)
    offsets[1:] = kept.sum(1).cumsum(0)
    return {"values": weight[kept], "bits": bits, "offsets": offsets}


@dataclass(frozen=True)
class Packing:
    """A way to store a frozen weight.

    Attributes:
        tensors: names of the tensors, in the op's order.
        pack: a weight (m, n) to its tensors by name.
        rows: the tensors and the shape to rows.
    """

    tensors: tuple[str, ...]
    pack: Callable[[Tensor], Mapping[str, Tensor]]
    rows: Callable[..., Rows]


PACKINGS = {
    "2:4": Packing(("values", "positions"), pack_2_4, PackedRows2of4),
    "bitmask": Packing(("values", "bits", "offsets"), pack_bitmask, PackedRowsBitmask),
}
OPS = {
    name: linear_op(op, PACKINGS[name].tensors, PACKINGS[name].rows, spp_fused.forward, spp_fused.backward)
    for name, op in (("2:4", "spp_linear_2_4"), ("bitmask", "spp_linear_bitmask"))
}


def choose_packing(weight: Tensor) -> str:
    """`2:4` where the weight (m, n) holds that pattern, else `bitmask`."""
    m, n = weight.shape
    if n % 4 == 0 and bool(((weight.reshape(m, n // 4, 4) != 0).sum(2) <= 2).all()):
        return "2:4"
    return "bitmask"
