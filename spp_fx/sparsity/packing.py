"""Packed sparse weights: 2:4 as values and two-bit positions, any pattern as values and a bit mask.

2:4. Of every group of four columns two values are kept, in ascending position. A nibble holds their
positions, idx0 | idx1 << 2; a byte holds two nibbles, the first group in the low one. A group with one entry
takes a second, zero one: the one in column 2 beside an entry in column 0 or 1, else columns 2 and 3; an empty
group is columns 2 and 3. PyTorch's CUTLASS conversion (torch/sparse/_semi_structured_conversions.py) chooses
the same, so that values and nibbles equal those made there.

1:2, the form of float32 on tensor cores. A float32 stands for two entries of 16 bits: the nibble of a pair is
0x4 for its first column and 0xE for its second.

Bit mask. Values are the elements whose bits are not all zero, in stored order; bit i, LSB first, says whether
element i is one of them.

All work is done on integers of the entries' width, so that NaN payloads, subnormals and the sign of a zero
survive bit for bit. A negative zero counts as a zero for the pattern, but its bits are not those of an empty
slot. It is kept in a slot that no non-zero needs; where none is left, packing fails and names the position,
or makes it positive and counts it.

The torch and numpy code here is the definition. On a CPU with numba, `packing_kernels` does the same work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spp_fx.compiled import optional_module
from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.parallel import in_order

#: Unsigned integer of the same width, by bytes.
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}

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

#: Entries worked on at a time: temporaries stay in cache and take a few MiB whatever the weight.
_CHUNK_ENTRIES = 1 << 19

#: Nibble of a group without entries: columns 2 and 3.
EMPTY_GROUP = 0xE


def _compiled() -> ModuleType | None:
    return optional_module("spp_fx.sparsity.packing_kernels")


def kernels(data: Tensor) -> ModuleType | None:
    """The compiled loops, if numba is installed and `data` is on the CPU."""
    return _compiled() if data.device.type == "cpu" else None


def for_row_chunks(work: Callable[[int, int], None], m: int, k: int) -> None:
    """Call work(start, stop) on consecutive row ranges of an (m, k) matrix, on all CPUs if loops are compiled.

    A range has at most `_CHUNK_ENTRIES` entries, or one row. The error of the first range that fails is raised.
    """
    step = max(1, _CHUNK_ENTRIES // max(1, k))
    ranges = [(start, min(m, start + step)) for start in range(0, m if k else 0, step)]
    jobs = 1 if len(ranges) <= 1 or _compiled() is None else None  # torch's own operations use all CPUs
    for _ in in_order(lambda rows: work(*rows), ranges, jobs):
        pass


# 2:4 and 1:2


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 (or, of float32, 1:2) matrix of m rows and k columns without its zeros.

    Args:
        values: (m, k/2), the kept entries of each row.
        positions: (m, ceil(k/8)) uint8, a nibble a group of four columns; with an odd number of groups the last
            high nibble is 0xE. 1:2: (m, ceil(k/4)), a nibble a pair.
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


def pack_2_4(weight: Tensor, *, clear: bool = False) -> Packed24:
    """Keep the two (or fewer) non-zeros of every four columns, with their positions.

    Args:
        weight: (m, k) float16, bfloat16, float32, float64, float8 (e4m3fn, e5m2), int8 or uint8, k a
            multiple of 4, already 2:4; any strides.
        clear: make negative zeros that no slot is left for positive.

    Returns:
        values (m, k/2) of weight's dtype and positions (m, ceil(k/8)) uint8, as in `Packed24`.

    Raises:
        UsageError: weight is not a matrix of a supported dtype.
        PatternError: k is no multiple of 4; or a group holds more than two non-zeros, or a negative zero
            that no slot is left for: names the first row and columns.
    """
    return _pack(weight, 4, clear)


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


def _pack(weight: Tensor, group: int, clear: bool = False) -> Packed24:
    bits = _bits(weight)
    m, k = weight.shape
    if k % 4:
        raise PatternError(f"{k} columns are no multiple of 4: 2:4 needs whole groups of four")
    values = torch.empty((m, k // 2), dtype=weight.dtype, device=bits.device)
    positions = torch.empty((m, (k // group + 1) // 2), dtype=torch.uint8, device=bits.device)

    def pack(start: int, stop: int) -> None:
        pack_rows(weight[start:stop], values[start:stop], positions[start:stop], start, group, clear=clear)

    for_row_chunks(pack, m, k)
    return Packed24(values, positions)


def pack_rows(
    rows: Tensor, values: Tensor, positions: Tensor, first_row: int, group: int = 4, *, clear: bool = False
) -> int:
    """Pack some rows of a weight, as `pack_2_4` (group 4) or `pack_1_2` (group 2), into existing memory.

    Args:
        rows: (r, k), any strides.
        values: (r, k/2) of the dtype of `rows`, contiguous.
        positions: (r, ceil(k/8)) or (r, k/4) uint8, contiguous.
        first_row: number of the first of these rows in the weight, for errors.
        clear: make negative zeros that no slot is left for positive.

    Returns:
        How many zeros were made positive.
    """
    kept, cleared = _bits(values), 0
    compiled = kernels(rows) if group == 4 else None

    def is_packed() -> bool:
        return bool(compiled) and not compiled.pack_2_4(_array(_bits(rows)), _array(kept), _array(positions))

    if is_packed():
        return 0
    if clear:
        rows, cleared = clear_negative_zeros(rows, group)
        if cleared and is_packed():
            return cleared
    r, count = len(rows), rows.shape[1] // group
    groups = _bits(rows).reshape(r, count, group)
    choose = _choose_two_of_four if group == 4 else _choose_one_of_two
    nibbles = choose(groups, kept.view(r, count, group // 2), first_row, rows.dtype)
    if count % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=EMPTY_GROUP)
    torch.bitwise_or(nibbles[:, 0::2], nibbles[:, 1::2] << 4, out=positions)
    return cleared


def _choose_two_of_four(groups: Tensor, values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
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


def _choose_one_of_two(pairs: Tensor, values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Fill values (rows, pairs, 1) from pairs (rows, pairs, 2); return the nibbles (rows, pairs) uint8."""
    first, second = pairs.unbind(-1)
    wrong = (first != 0) & (second != 0)
    if bool(wrong.any()):
        row, pair = (int(i) for i in wrong.nonzero()[0])
        raise PatternError(_violation(pairs[row, pair], first_row + row, 2 * pair, dtype))
    values[..., 0] = torch.where(first != 0, first, second)
    return torch.where(first != 0, 0x4, 0xE).to(torch.uint8)


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
    cleared, count = bits.clone(memory_format=torch.contiguous_format), 0
    if compiled := kernels(bits):
        count = compiled.clear_negative_zeros(_array(cleared), group)
        return (cleared.view(weight.dtype), count) if count else (weight, 0)
    groups = cleared.view(cleared.numel() // group, group)
    for rows in groups.split(_CHUNK_ENTRIES // group):
        negative = rows == torch.iinfo(bits.dtype).min
        slots = group // 2 - ((rows != 0) & ~negative).sum(-1, keepdim=True)
        negative &= negative.cumsum(-1) > slots
        rows.masked_fill_(negative, 0)
        count += int(negative.count_nonzero())
    return (cleared.view(weight.dtype), count) if count else (weight, 0)


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
    bits, positions = _bits(packed.values), packed.positions
    m = bits.shape[0]
    if k % 4 or bits.shape[1] != k // 2:
        raise FormatError(
            f"values have shape {tuple(bits.shape)}, a matrix of {k} columns needs ({m}, {k / 2:g})"
        )
    if positions.dtype != torch.uint8 or positions.shape != (m, (k + 7) // 8):
        raise FormatError(
            f"positions are {positions.dtype} of shape {tuple(positions.shape)}, "
            f"a matrix of {k} columns needs torch.uint8 of shape ({m}, {(k + 7) // 8})"
        )
    dense = torch.empty((m, k), dtype=packed.values.dtype, device=bits.device)

    def unpack(start: int, stop: int) -> None:
        rows = slice(start, stop)
        unpack_rows(packed.values[rows], positions[rows], dense[rows], first_row + start)

    for_row_chunks(unpack, m, k)
    return dense


def unpack_rows(
    values: Tensor, positions: Tensor, out: Tensor, first_row: int = 0, *, check: bool = True
) -> None:
    """Fill rows of a dense matrix, the inverse of `pack_rows`.

    Args:
        values: (r, k/2) of the dtype of `out`.
        positions: (r, ceil(k/8)) uint8.
        out: (r, k), contiguous; every element is written.
        first_row: number of the first of these rows in the weight, for errors.
        check: raise for a nibble that is not idx0 < idx1. On a GPU that waits for it.

    Raises:
        FormatError: names the first wrong nibble.
    """
    kept, dense = _bits(values), _bits(out)
    if compiled := kernels(dense):
        faults = compiled.unpack_2_4(_array(kept), _array(positions), _array(dense))
        if not faults or not check:
            return
    r, groups = len(out), out.shape[1] // 4
    nibbles = _checked_nibbles(positions, 4 * groups, first_row) if check else _nibbles(positions)[:, :groups]
    v0, v1 = kept.reshape(r, groups, 2).unbind(-1)
    i0, i1 = nibbles & 3, nibbles >> 2
    lanes = dense.view(r, groups, 4)
    lanes[..., 0] = torch.where(i0 == 0, v0, 0)
    lanes[..., 1] = torch.where(i0 == 1, v0, torch.where(i1 == 1, v1, 0))
    lanes[..., 2] = torch.where(i0 == 2, v0, torch.where(i1 == 2, v1, 0))
    lanes[..., 3] = torch.where(i1 == 3, v1, 0)


def unpack_1_2(packed: Packed24, k: int, first_row: int = 0) -> Tensor:
    """The dense matrix that `pack_1_2` packed, bit for bit: (m, k) float32; arguments as for `unpack_2_4`.

    Raises:
        FormatError: shapes or dtypes do not fit k, or a nibble is neither 0x4 nor 0xE: names the first one.
    """
    nibbles = _nibbles(packed.positions)
    wrong = (nibbles != 0x4) & (nibbles != 0xE)
    if bool(wrong.any()):
        row, pair = (int(i) for i in wrong.nonzero()[0])
        raise FormatError(
            f"row {first_row + row}, columns {2 * pair}-{2 * pair + 1} have the position nibble "
            f"0x{int(nibbles[row, pair]):X}, a pair has 0x4 or 0xE"
        )
    # A float32 is two entries of 16 bits, kept or not together.
    halves = Packed24(packed.values.contiguous().view(torch.int16).view(torch.float16), packed.positions)
    return unpack_2_4(halves, 2 * k, first_row).view(torch.float32)


def _checked_nibbles(positions: Tensor, k: int, first_row: int) -> Tensor:
    """The nibbles (rows, k/4) of positions (rows, bytes); FormatError names the first that is wrong."""
    nibbles = _nibbles(positions)
    ascending = (nibbles & 3) < (nibbles >> 2)
    if not bool(ascending.all()):
        row, group = (int(i) for i in (~ascending).nonzero()[0])
        raise FormatError(
            f"row {first_row + row}, columns {4 * group}-{4 * group + 3} have the position nibble "
            f"0x{int(nibbles[row, group]):X}, which is not idx0 | idx1 << 2 with idx0 < idx1"
        )
    padding = nibbles[:, k // 4 :]  # of another value it would leave the row's length in doubt
    if bool((padding != EMPTY_GROUP).any()):
        row = int((padding != EMPTY_GROUP).nonzero()[0, 0])
        raise FormatError(
            f"row {first_row + row} ends with the nibble 0x{int(padding[row, 0]):X}, padding is 0xE"
        )
    return nibbles[:, : k // 4]


def _nibbles(positions: Tensor) -> Tensor:
    return torch.stack((positions & 0xF, positions >> 4), dim=-1).flatten(1)


def _bits(matrix: Tensor) -> Tensor:
    """The matrix's entries as integers of the same width: a view."""
    if matrix.dtype not in _BITS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _BITS)
        raise UsageError(f"cannot pack {matrix.dtype} as 2:4; supported are {known}")
    if matrix.dim() != 2:
        raise UsageError(f"cannot pack a tensor of shape {tuple(matrix.shape)} as 2:4: it is not a matrix")
    return matrix.detach().view(_BITS[matrix.dtype])


def _array(bits: Tensor) -> NDArray[Any]:
    """Integers as a contiguous numpy array of unsigned ones: one kernel a width serves both signs."""
    return as_array(bits.contiguous().view(_UNSIGNED[bits.element_size()]))


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as a numpy array; half precision as unsigned integers: numpy has no bfloat16.

    Through DLPack: `Tensor.numpy` would forbid the storage to be resized, and FSDP resizes what it gathers.
    """
    tensor = tensor.detach()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return np.from_dlpack(tensor.view(torch.uint16) if half else tensor)


# Bit masks


def compress(elements: NDArray[Any], bits: NDArray[np.uint8]) -> NDArray[Any]:
    """The elements whose bits are not all zero.

    Args:
        elements: (n,) or (m, n) unsigned integers, contiguous.
        bits: (ceil(n/8),) or (m, ceil(n/8)), receives which they are, LSB first.
    """
    kept = elements != 0
    bits[:] = np.packbits(kept, axis=-1, bitorder="little")
    if compiled := _compiled():
        values = np.empty(elements.size, elements.dtype)
        return values[: compiled.compress(elements.reshape(-1), values)]
    return elements[kept]


def expand(bits: NDArray[np.uint8], values: NDArray[Any], elements: NDArray[Any]) -> None:
    """Fill `elements`, (n,) or (m, n), from a bit mask and the values of its ones; as many of those as of values."""
    if compiled := _compiled():
        compiled.expand(np.atleast_2d(bits), values, np.atleast_2d(elements))
        return
    elements[:] = 0
    ones = np.unpackbits(bits, axis=-1, count=elements.shape[-1], bitorder="little")
    elements[ones.view(np.bool_)] = values


def pack_bitmask(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bits and offsets of the rows of a weight (m, n), each of which has bytes of its own.

    Returns:
        values (nnz,) of weight's dtype, bits (m, ceil(n/8)) uint8, and offsets (m + 1,) int64 of each row's values.
    """
    elements = _array(weight.detach().cpu())
    bits = np.empty((elements.shape[0], -(-elements.shape[1] // 8)), np.uint8)
    values = compress(elements, bits).copy()
    offsets = np.zeros(len(elements) + 1, np.int64)
    np.cumsum(np.bitwise_count(bits).sum(axis=1, dtype=np.int64), out=offsets[1:])
    kept, mask, starts = (torch.from_numpy(each).to(weight.device) for each in (values, bits, offsets))
    return kept.view(weight.dtype), mask, starts


def unpack_bitmask(values: Tensor, bits: Tensor, out: Tensor) -> None:
    """Fill rows `out` (r, n) from what `pack_bitmask` made of them; every element is written."""
    if out.device.type == "cpu":
        expand(as_array(bits), _array(values), _array(out))
        return
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits.unsqueeze(2) >> shifts) & 1).flatten(1)[:, : out.shape[1]].bool()
    out.zero_().masked_scatter_(kept, values)


def count_ones(bits: NDArray[np.uint8]) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
