"""The layout-neutral packed form of a 2:4 weight: kept values and two-bit positions.

Every 2:4 artifact starts from this form: it depends on no GPU, library or version, so a pack for one of
them can be rebuilt from it at load. All work is done on integer views of the entries: NaN payloads,
subnormals and the sign of a zero survive bit for bit.

float32 is 1:2 sparse on tensor cores. Its form has the same nibbles, those of two entries of 16 bits each
where a float32 stands: 0x4 for the first of a pair, 0xE for the second.

Negative zeros. For the pattern -0.0 is a zero, but it is not the all-zero bits that an unkept entry decodes
to. A group has two slots (a pair one): a -0.0 is kept in a slot that no non-zero needs, and where none is
left packing fails and names the place. `clear_negative_zeros` makes those +0.0 and counts them, so that a
caller who accepts the change can say so.

The torch code below is the definition; on a CPU compiled loops (`_pack_kernels`) do the same work.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.parallel import thread_count

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
    """A 2:4 (or, of float32, 1:2) matrix of m rows and k columns without its zeros.

    Args:
        values: (m, k/2), the two slots of every group of four columns, in ascending position.
        positions: (m, ceil(k/8)) uint8, two groups a byte, the first in the low nibble; a group is
            idx0 | idx1 << 2 with idx0 < idx1. With an odd number of groups the last high nibble is 0xE.
            1:2: (m, ceil(k/4)), a nibble a pair.
    """

    values: Tensor
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of the dense matrix."""
        return self.values.shape[0], 2 * self.values.shape[1]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether `pack_2_4` takes this dtype."""
    return dtype in _BITS


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
    return _pack(weight, 4)


def pack_1_2(weight: Tensor) -> Packed24:
    """Keep the non-zero of every two columns, or a +0.0 in the second slot, with its position.

    Args:
        weight: (m, k) float32, k a multiple of 4, already 1:2; any strides.

    Returns:
        values (m, k/2) float32 and positions (m, k/4) uint8, as in `Packed24`.

    Raises:
        UsageError, PatternError: as for `pack_2_4`, of pairs.
    """
    if weight.dtype != torch.float32:
        raise UsageError(f"cannot pack {weight.dtype} as 1:2: it is the form of float32")
    return _pack(weight, 2)


def pack_rows(
    rows: Tensor, values: Tensor, positions: Tensor, first_row: int, group: int = 4, *, clear: bool = False
) -> int:
    """`pack_2_4` (group 4) or `pack_1_2` (group 2) of some rows of a weight, into memory that is there.

    Args:
        rows: (r, k), any strides.
        values: (r, k/2) of the dtype of `rows`, contiguous.
        positions: (r, ceil(k/8)) or (r, k/4) uint8, contiguous.
        first_row: number of the first of these rows in the weight, for errors.
        clear: make the negative zeros that no slot is left for positive.

    Returns:
        How many zeros were made positive.
    """
    kept, cleared = _bits(values), 0
    if compiled := kernels(rows):
        pack = compiled.pack_2_4 if group == 4 else compiled.pack_1_2
        faults = pack(_unsigned(_bits(rows)), _unsigned(kept), positions.numpy())
        if faults and clear:
            rows, cleared = clear_negative_zeros(rows, group)
            faults = pack(_unsigned(_bits(rows)), _unsigned(kept), positions.numpy())
        if not faults:
            return cleared
    elif clear:
        rows, cleared = clear_negative_zeros(rows, group)
    r, count = len(rows), rows.shape[1] // group
    choose = _pack_groups if group == 4 else _pack_pairs
    groups = _bits(rows).reshape(r, count, group)
    nibbles = choose(groups, kept.view(r, count, group // 2), first_row, rows.dtype)
    if count % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=EMPTY_GROUP)
    torch.bitwise_or(nibbles[:, 0::2], nibbles[:, 1::2] << 4, out=positions)
    return cleared


def unpack_2_4(packed: Packed24, k: int, first_row: int = 0) -> Tensor:
    """The dense matrix that was packed, bit for bit.

    Args:
        packed: values (m, k/2) and positions (m, ceil(k/8)) uint8, as `pack_2_4` returns them.
        k: columns of the dense matrix.
        first_row: number of the first row in the whole weight, for errors.

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
    compiled = kernels(bits)

    def unpack(start: int, stop: int) -> None:
        kept, places, rows = bits[start:stop], packed.positions[start:stop], dense[start:stop]
        if compiled and not compiled.unpack_2_4(
            _unsigned(kept), places.contiguous().numpy(), _unsigned(rows)
        ):
            return
        nibbles = _nibbles(places, first_row + start)
        if k % 8:
            _check_padding(nibbles[:, -1], first_row + start)
        r = stop - start
        _unpack_groups(kept.reshape(r, k // 4, 2), nibbles[:, : k // 4], rows.view(r, k // 4, 4))

    in_parallel(unpack, row_chunks(m, k))
    return dense.view(packed.values.dtype)


def unpack_1_2(packed: Packed24, k: int, first_row: int = 0) -> Tensor:
    """The dense matrix that `pack_1_2` packed, bit for bit: (m, k) float32; arguments as for `unpack_2_4`.

    Raises:
        FormatError: shapes or dtypes do not fit k, or a nibble is neither 0x4 nor 0xE: names the first one.
    """
    # A float32 is two entries of 16 bits, kept or not together.
    halves = Packed24(packed.values.contiguous().view(torch.int16).view(torch.float16), packed.positions)
    nibbles = torch.stack((packed.positions & 0xF, packed.positions >> 4), dim=-1).flatten(1)
    wrong = (nibbles != 0x4) & (nibbles != 0xE)
    if bool(wrong.any()):
        row, pair = (int(i) for i in wrong.nonzero()[0])
        raise FormatError(
            f"row {first_row + row}, columns {2 * pair}-{2 * pair + 1} have the position nibble "
            f"0x{int(nibbles[row, pair]):X}, a pair has 0x4 or 0xE"
        )
    return unpack_2_4(halves, 2 * k, first_row).view(torch.float32)


def clear_negative_zeros(weight: Tensor, group: int = 4) -> tuple[Tensor, int]:
    """Make the negative zeros that no slot is left for positive, and count them.

    A group keeps as many of them as its non-zeros leave slots, the first ones.

    Args:
        weight: (m, k) of a dtype that `pack_2_4` takes, k a multiple of `group`.
        group: columns that share half as many slots: 4, or 2 for `pack_1_2`.

    Returns:
        The weight, a copy where anything changed, and how many zeros lost their sign. Integers have no
        negative zero.

    Raises:
        UsageError: weight is not a matrix of a supported dtype.
    """
    bits = _bits(weight)
    if not weight.dtype.is_floating_point:
        return weight, 0
    cleared = bits.clone(memory_format=torch.contiguous_format)
    if compiled := kernels(bits):
        count = compiled.clear_negative_zeros(_unsigned(cleared), group)
        return (cleared.view(weight.dtype), count) if count else (weight, 0)
    count = 0
    for start, stop in row_chunks(*weight.shape):
        rows = cleared[start:stop].view(-1, group)
        negative = rows == torch.iinfo(bits.dtype).min
        slots = group // 2 - ((rows != 0) & ~negative).sum(-1, keepdim=True)
        negative &= negative.cumsum(-1) > slots
        rows.masked_fill_(negative, 0)
        count += int(negative.count_nonzero())
    return (cleared.view(weight.dtype), count) if count else (weight, 0)


def kernels(data: Tensor) -> ModuleType | None:
    """The compiled loops, where they can be had and `data` is where they run."""
    return _kernels() if data.device.type == "cpu" else None


@cache
def _kernels() -> ModuleType | None:
    try:
        from spp_fx.exporters import _pack_kernels
    except ImportError:
        return None
    return _pack_kernels


def in_parallel(work: Callable[[int, int], None], ranges: Iterator[tuple[int, int]]) -> None:
    """Do some work on ranges of rows, on the CPUs at hand; the error of the first range that has one is raised."""
    all_ranges = list(ranges)
    if len(all_ranges) <= 1 or _kernels() is None:  # torch's own operations run on all CPUs as they are
        for start, stop in all_ranges:
            work(start, stop)
        return
    with ThreadPoolExecutor(min(len(all_ranges), thread_count())) as pool:
        for done in [pool.submit(work, start, stop) for start, stop in all_ranges]:
            done.result()


def _pack(weight: Tensor, group: int) -> Packed24:
    bits = _bits(weight)
    m, k = weight.shape
    if k % 4:
        raise PatternError(f"{k} columns are no multiple of 4: 2:4 needs whole groups of four")
    values = torch.empty((m, k // 2), dtype=weight.dtype, device=bits.device)
    positions = torch.empty((m, (k // group + 1) // 2), dtype=torch.uint8, device=bits.device)

    def pack(start: int, stop: int) -> None:
        pack_rows(weight[start:stop], values[start:stop], positions[start:stop], start, group)

    in_parallel(pack, row_chunks(m, k))
    return Packed24(values, positions)


def _bits(matrix: Tensor) -> Tensor:
    """The matrix's entries as integers of the same width: a view."""
    if matrix.dtype not in _BITS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _BITS)
        raise UsageError(f"cannot pack {matrix.dtype} as 2:4; supported are {known}")
    if matrix.dim() != 2:
        raise UsageError(f"cannot pack a tensor of shape {tuple(matrix.shape)} as 2:4: it is not a matrix")
    return matrix.detach().view(_BITS[matrix.dtype])


def _unsigned(bits: Tensor) -> Any:
    """Integers as a contiguous numpy array of unsigned ones: one kernel a width serves both signs."""
    array = bits.contiguous().numpy()
    return array.view(f"u{array.itemsize}")


def row_chunks(m: int, k: int) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of at most _CHUNK_ENTRIES entries, or of one row where a row is longer."""
    if k == 0:
        return
    step = max(1, _CHUNK_ENTRIES // k)
    for start in range(0, m, step):
        yield start, min(m, start + step)


def _pack_pairs(pairs: Tensor, values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Fill values (rows, pairs, 1) from pairs (rows, pairs, 2); return the nibbles (rows, pairs) uint8."""
    first, second = pairs.unbind(-1)
    wrong = (first != 0) & (second != 0)
    if bool(wrong.any()):
        row, pair = (int(i) for i in wrong.nonzero()[0])
        raise PatternError(_violation(pairs[row, pair], first_row + row, 2 * pair, dtype))
    values[..., 0] = torch.where(first != 0, first, second)
    return torch.where(first != 0, 0x4, 0xE).to(torch.uint8)


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
    """Why a group of entries at (row, column) cannot be packed; more than half are not all-zero bits."""
    kept = group != 0
    negative = group == torch.iinfo(group.dtype).min if dtype.is_floating_point else torch.zeros_like(kept)
    size, zeros = len(group), int(negative.sum())
    slots, nonzeros = size // 2, int(kept.sum()) - zeros
    where = f"row {row}, columns {column}-{column + size - 1}"
    if nonzeros > slots:
        return f"{where} hold {nonzeros} non-zeros, {slots}:{size} allows {slots}"
    first = column + int(negative.nonzero()[0])
    return (
        f"{where} hold {nonzeros} non-zeros and {zeros} negative zeros (-0.0, the first in column {first}): "
        "the slots of a group cannot keep every sign; clear the negative zeros first"
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
