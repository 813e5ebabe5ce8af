"""The layout-neutral packed form of a 2:4 weight: kept values and two-bit positions.

Every 2:4 artifact starts from this form: it depends on no GPU, library or version, so a pack for one of
them can be rebuilt from it at load. All work is done on integer views of the entries: NaN payloads,
subnormals and the sign of a zero survive bit for bit.

Negative zeros. For the pattern -0.0 is a zero, but it is not the all-zero bits that an unkept entry decodes
to. A group has two slots: a -0.0 is kept in a slot that no non-zero needs, and where none is left packing
fails and names the place. `clear_negative_zeros` makes them +0.0 and counts them, so that a caller who
accepts the change can say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.errors import FormatError, PatternError, UsageError

#: Signed integer of the same width, through which the bits of an entry are read.
_BITS: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
}

#: Entries worked on at a time: keeps temporaries in cache, a few MiB whatever the weight.
_CHUNK_ENTRIES = 1 << 19

#: Nibble of a group without entries: slots 2 and 3.
EMPTY_GROUP = 0xE


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 matrix of m rows and k columns without its zeros.

    Args:
        values: (m, k/2), the two slots of every group of four columns, in ascending position.
        positions: (m, ceil(k/8)) uint8, two groups a byte, the first in the low nibble; a group is
            idx0 | idx1 << 2 with idx0 < idx1. With an odd number of groups the last high nibble is 0xE.
    """

    values: Tensor
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of the dense matrix."""
        return self.values.shape[0], 2 * self.values.shape[1]


def pack_2_4(weight: Tensor) -> Packed24:
    """Keep the two (or fewer) non-zeros of every four columns, with their positions.

    A group with one entry takes a second slot that holds +0.0: slot 2 beside an entry in 0 or 1, else the
    pair (2, 3); an empty group is (2, 3). These are the choices of PyTorch's CUTLASS conversion
    (torch/sparse/_semi_structured_conversions.py), so that values and nibbles equal those made there.

    Args:
        weight: (m, k) float16, bfloat16, float32, float64, float8 (e4m3fn, e5m2), int8 or uint8, k a
            multiple of 4, already 2:4; any strides.

    Returns:
        values (m, k/2) of weight's dtype and positions (m, ceil(k/8)) uint8, as in `Packed24`.

    Raises:
        UsageError: weight is not a matrix of a supported dtype.
        PatternError: k is no multiple of 4; or a group holds more than two non-zeros, or a negative zero
            that no slot is left for: names the first row and columns.
    """
    bits = _bits(weight)
    m, k = weight.shape
    if k % 4:
        raise PatternError(f"{k} columns are no multiple of 4: 2:4 needs whole groups of four")
    values = torch.empty((m, k // 2), dtype=bits.dtype, device=weight.device)
    positions = torch.empty((m, (k + 7) // 8), dtype=torch.uint8, device=weight.device)
    for start, stop in _row_chunks(m, k):
        groups = bits[start:stop].reshape(stop - start, k // 4, 4)
        nibbles = _pack_groups(groups, values[start:stop].view(stop - start, k // 4, 2), start, weight.dtype)
        if k % 8:
            nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=EMPTY_GROUP)
        torch.bitwise_or(nibbles[:, 0::2], nibbles[:, 1::2] << 4, out=positions[start:stop])
    return Packed24(values.view(weight.dtype), positions)


def unpack_2_4(packed: Packed24, k: int) -> Tensor:
    """The dense matrix that was packed, bit for bit.

    Args:
        packed: values (m, k/2) and positions (m, ceil(k/8)) uint8, as `pack_2_4` returns them.
        k: columns of the dense matrix.

    Returns:
        (m, k) of the values' dtype.

    Raises:
        UsageError: the values' dtype is not supported.
        FormatError: shapes or dtypes do not fit k, or a nibble is not idx0 < idx1: names the first one.
    """
    bits = _bits(packed.values)
    m = bits.shape[0]
    if k % 4 or bits.shape[1] != k // 2:
        raise FormatError(
            f"values have shape {tuple(bits.shape)}, a matrix of {k} columns needs ({m}, {k / 2:g})"
        )
    if packed.positions.dtype != torch.uint8 or packed.positions.shape != (m, (k + 7) // 8):
        raise FormatError(
            f"positions are {packed.positions.dtype} of shape {tuple(packed.positions.shape)}, "
            f"a matrix of {k} columns needs torch.uint8 of shape ({m}, {(k + 7) // 8})"
        )
    dense = torch.empty((m, k), dtype=bits.dtype, device=bits.device)
    for start, stop in _row_chunks(m, k):
        nibbles = _nibbles(packed.positions[start:stop], start)
        if k % 8:
            _check_padding(nibbles[:, -1], start)
        _unpack_groups(
            bits[start:stop].reshape(stop - start, k // 4, 2),
            nibbles[:, : k // 4],
            dense[start:stop].view(stop - start, k // 4, 4),
        )
    return dense.view(packed.values.dtype)


def clear_negative_zeros(weight: Tensor) -> tuple[Tensor, int]:
    """Make every -0.0 of a matrix +0.0, so that none can be in the way of packing.

    Args:
        weight: (m, k) of a dtype that `pack_2_4` takes; not modified.

    Returns:
        the matrix (weight itself where nothing had to change) and how many entries changed.

    Raises:
        UsageError: weight is not a matrix of a supported dtype.
    """
    bits = _bits(weight)
    if not weight.dtype.is_floating_point:
        return weight, 0
    cleared: Tensor | None = None
    count = 0
    for start, stop in _row_chunks(*weight.shape):
        negative = bits[start:stop] == torch.iinfo(bits.dtype).min
        found = int(negative.count_nonzero())
        if found:
            if cleared is None:
                cleared = bits.clone(memory_format=torch.contiguous_format)
            cleared[start:stop].masked_fill_(negative, 0)
            count += found
    return (weight, 0) if cleared is None else (cleared.view(weight.dtype), count)


def _bits(matrix: Tensor) -> Tensor:
    """The matrix's entries as integers of the same width: a view."""
    if matrix.dtype not in _BITS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _BITS)
        raise UsageError(f"cannot pack {matrix.dtype} as 2:4; supported are {known}")
    if matrix.dim() != 2:
        raise UsageError(f"cannot pack a tensor of shape {tuple(matrix.shape)} as 2:4: it is not a matrix")
    return matrix.detach().view(_BITS[matrix.dtype])


def _row_chunks(m: int, k: int) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of at most _CHUNK_ENTRIES entries, or of one row where a row is longer."""
    if k == 0:
        return
    step = max(1, _CHUNK_ENTRIES // k)
    for start in range(0, m, step):
        yield start, min(m, start + step)


def _pack_groups(groups: Tensor, values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Fill values (rows, groups, 2) from groups (rows, groups, 4); return the nibbles (rows, groups) uint8.

    A kept entry is one whose bits are not all zero. With at most two of them per group, slot 0 is the first
    of entries 0, 1, 2 that is kept (or 2), and slot 1 is 1 where 0 and 1 are both kept, 3 where 3 is kept or
    neither 0 nor 1 is, and 2 otherwise.
    """
    x0, x1, x2, x3 = groups.unbind(-1)
    n0, n1, n2, n3 = (groups != 0).unbind(-1)
    counts = n0.to(torch.uint8) + n1 + n2 + n3
    if int(counts.max()) > 2:
        row, group = (int(i) for i in (counts > 2).nonzero()[0])
        raise PatternError(_violation(groups[row, group], first_row + row, 4 * group, dtype))
    both = n0 & n1
    neither = ~(n0 | n1)
    last = n3 | neither
    values[..., 0] = torch.where(n0, x0, torch.where(n1, x1, x2))
    values[..., 1] = torch.where(both, x1, torch.where(last, x3, x2))
    nibbles = (n1 & ~n0).to(torch.uint8)
    nibbles |= neither.to(torch.uint8) << 1
    nibbles |= (both | last).to(torch.uint8) << 2
    nibbles |= (~both).to(torch.uint8) << 3
    return nibbles


def _violation(group: Tensor, row: int, column: int, dtype: torch.dtype) -> str:
    """Why the four entries at (row, column) cannot be packed; some three of them are not all-zero bits."""
    kept = group != 0
    negative = group == torch.iinfo(group.dtype).min if dtype.is_floating_point else torch.zeros_like(kept)
    zeros = int(negative.sum())
    nonzeros = int(kept.sum()) - zeros
    where = f"row {row}, columns {column}-{column + 3}"
    if nonzeros > 2:
        return f"{where} hold {nonzeros} non-zeros, 2:4 allows 2"
    first = column + int(negative.nonzero()[0])
    return (
        f"{where} hold {nonzeros} non-zeros and {zeros} negative zeros (-0.0, the first in column {first}): "
        "with two slots a group not every sign can be kept; clear the negative zeros first"
    )


def _nibbles(positions: Tensor, first_row: int) -> Tensor:
    """The nibbles (rows, 2 bytes) of positions (rows, bytes), each of them checked."""
    nibbles = torch.stack((positions & 0xF, positions >> 4), dim=-1).flatten(1)
    ascending = (nibbles & 3) < (nibbles >> 2)
    if not bool(ascending.all()):
        row, group = (int(i) for i in (~ascending).nonzero()[0])
        raise FormatError(
            f"row {first_row + row}, columns {4 * group}-{4 * group + 3} have the position nibble "
            f"0x{int(nibbles[row, group]):X}, which is not idx0 | idx1 << 2 with idx0 < idx1"
        )
    return nibbles


def _check_padding(nibbles: Tensor, first_row: int) -> None:
    """Refuse a last high nibble (rows,) that stands for no group and is not 0xE: the length is in doubt."""
    wrong = nibbles != EMPTY_GROUP
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise FormatError(
            f"row {first_row + row} ends with the nibble 0x{int(nibbles[row]):X}, padding is 0xE"
        )


def _unpack_groups(values: Tensor, nibbles: Tensor, dense: Tensor) -> None:
    """Fill dense (rows, groups, 4) from values (rows, groups, 2) and nibbles (rows, groups) uint8."""
    v0, v1 = values.unbind(-1)
    i0 = nibbles & 3
    i1 = nibbles >> 2
    dense[..., 0] = torch.where(i0 == 0, v0, 0)
    dense[..., 1] = torch.where(i0 == 1, v0, torch.where(i1 == 1, v1, 0))
    dense[..., 2] = torch.where(i0 == 2, v0, torch.where(i1 == 2, v1, 0))
    dense[..., 3] = torch.where(i1 == 3, v1, 0)
