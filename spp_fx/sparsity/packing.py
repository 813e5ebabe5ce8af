"""Packed sparse weights: 2:4 as values and two-bit positions, any pattern as values and a bit mask.

2:4. Of every group of four columns two values are kept, in ascending position. A nibble holds their
positions, idx0 | idx1 << 2; a byte holds two nibbles, the first group in the low one. A group with one entry
takes a second, zero one: the one in column 2 beside an entry in column 0 or 1, else columns 2 and 3; an empty
group is columns 2 and 3. PyTorch's CUTLASS conversion (torch/sparse/_semi_structured_conversions.py) makes
the same choice, so values and nibbles are equal.

1:2, the form of float32 on tensor cores. A float32 counts as two entries of 16 bits: the nibble of a pair is
0x4 for its first column and 0xE for its second.

Bit mask. Values are the elements whose bits are not all zero, in stored order; bit i, LSB first, is set where
element i is one of them.

All work is done on integers of the entries' width, so that NaN payloads, subnormals and the sign of a zero
survive bit for bit. A negative zero counts as a zero for the pattern, but its bits are not those of an empty
slot. It is kept in a slot that no non-zero needs; where none is free, packing fails and names the position,
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

#: By group size: the nibble of each set of entries (bit i: column i has one); 0 for those that do not fit.
_NIBBLES = {
    4: torch.tensor(
        [0xE, 0x8, 0x9, 0x4, 0xE, 0x8, 0x9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0], dtype=torch.uint8
    ),
    2: torch.tensor([0xE, 0x4, 0xE, 0], dtype=torch.uint8),
}


def _compiled() -> ModuleType | None:
    return optional_module("spp_fx.sparsity.packing_kernels")


def kernels(data: Tensor) -> ModuleType | None:
    """The compiled loops, if numba is installed and `data` is on the CPU."""
    return _compiled() if data.device.type == "cpu" else None


def for_row_chunks(work: Callable[[int, int], None], m: int, k: int) -> None:
    """Call work(start, stop) on consecutive row ranges of an (m, k) matrix, on all CPUs if loops are compiled."""
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
        positions: (m, ceil(k/8)) uint8, a nibble for each group of four columns; with an odd number of groups the
            last high nibble is 0xE. 1:2: (m, ceil(k/4)), a nibble for each pair.
    """

    values: Tensor
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether `pack_2_4` supports this dtype."""
    return dtype in _BITS


def pack_2_4(weight: Tensor, *, clear: bool = False) -> Packed24:
    """Keep the two (or fewer) non-zeros of every four columns, with their positions.

    Args:
        weight: (m, k) of a dtype that `can_pack` allows, k a multiple of 4, already 2:4; any strides.
        clear: make negative zeros positive where no slot is free for them.

    Returns:
        values (m, k/2) of weight's dtype and positions (m, ceil(k/8)) uint8, as in `Packed24`.

    Raises:
        UsageError: weight is not a matrix of a supported dtype.
        PatternError: k is not a multiple of 4; or a group holds more than two non-zeros, or a negative zero
            for which no slot is free: names the first row and columns.
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
        raise PatternError(f"{k} columns are not a multiple of 4: 2:4 needs whole groups of four")
    values = torch.empty((m, k // 2), dtype=weight.dtype, device=bits.device)
    positions = torch.empty((m, (k // group + 1) // 2), dtype=torch.uint8, device=bits.device)

    def pack(start: int, stop: int) -> None:
        pack_rows(weight[start:stop], values[start:stop], positions[start:stop], start, group, clear=clear)

    for_row_chunks(pack, m, k)
    return Packed24(values, positions)


def pack_rows(
    rows: Tensor, values: Tensor, positions: Tensor, first_row: int, group: int = 4, *, clear: bool = False
) -> int:
    """Pack (r, k) rows of a weight, as `pack_2_4` (group 4) or `pack_1_2` (group 2), into existing memory.

    Args:
        values, positions: as in `Packed24`, contiguous, for these rows.
        first_row: number of the first of these rows in the weight, for errors.
        clear: make negative zeros positive where no slot is free for them.

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
    nibbles = _choose(groups, kept.view(r, count, group // 2), first_row, rows.dtype)
    if count % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=EMPTY_GROUP)
    torch.bitwise_or(nibbles[:, 0::2], nibbles[:, 1::2] << 4, out=positions)
    return cleared


def _choose(groups: Tensor, values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Fill values (rows, groups, size / 2) from groups (rows, groups, size); return the nibbles (rows, groups)."""
    size = groups.shape[-1]
    entries = ((groups != 0) * (1 << torch.arange(size, device=groups.device))).sum(-1)
    nibbles = _NIBBLES[size].to(groups.device)[entries]
    if bool((nibbles == 0).any()):
        row, group = (int(i) for i in (nibbles == 0).nonzero()[0])
        raise PatternError(_violation(groups[row, group], first_row + row, size * group, dtype))
    slots = torch.stack((nibbles & 3, nibbles >> 2), -1) if size == 4 else (nibbles >> 3).unsqueeze(-1)
    torch.gather(groups, -1, slots.long(), out=values)
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


def clear_negative_zeros(weight: Tensor, group: int = 4) -> tuple[Tensor, int]:
    """Make negative zeros positive where no slot is free for them, and count them.

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
    nibbles = _nibbles(positions)
    if check:
        _check_nibbles(nibbles, 4, first_row)
        padding = nibbles[:, groups:]  # any other value would leave the row's length in doubt
        if bool((padding != EMPTY_GROUP).any()):
            row = int((padding != EMPTY_GROUP).nonzero()[0, 0])
            raise FormatError(
                f"row {first_row + row} ends with the nibble 0x{int(padding[row, 0]):X}, padding is 0xE"
            )
    nibbles = nibbles[:, :groups]
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
    _check_nibbles(_nibbles(packed.positions), 2, first_row)
    # A float32 is two entries of 16 bits, kept or not together.
    halves = Packed24(packed.values.contiguous().view(torch.int16).view(torch.float16), packed.positions)
    return unpack_2_4(halves, 2 * k, first_row).view(torch.float32)


def _nibbles(positions: Tensor) -> Tensor:
    return torch.stack((positions & 0xF, positions >> 4), dim=-1).flatten(1)


def _check_nibbles(nibbles: Tensor, size: int, first_row: int) -> None:
    """FormatError names the first of the nibbles (rows, groups) that no group of `size` has."""
    if size == 4:
        wrong, form = (nibbles & 3) >= (nibbles >> 2), "idx0 | idx1 << 2 with idx0 < idx1"
    else:
        wrong, form = (nibbles != 0x4) & (nibbles != 0xE), "0x4 or 0xE"
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise FormatError(
            f"row {first_row + row}, columns {size * group}-{size * (group + 1) - 1} have the position nibble "
            f"0x{int(nibbles[row, group]):X}, which is not {form}"
        )


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
