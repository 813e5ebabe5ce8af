"""Tile and pullback of SPP and of low-rank updates as Triton kernels.

A program takes some rows and walks along their columns, or takes one tile. All read a packed weight at its packed
size and unpack it in registers. Sums are taken in a fixed order: each program writes the sums of its own rows, and
those are added afterwards, so results repeat to the bit. Triton's interpreter runs the same code on the CPU
(TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp_fx.adapters.op import AdaptedWeight
from spp_fx.adapters.rows import DenseRows, PackedRows2of4, PackedRowsBitmask, Rows
from spp_fx.adapters.spp import SPP

ROWS, COLUMNS = 16, 256
LOW_RANK_ROWS, LOW_RANK_COLUMNS = 64, 128
"""A tile whose sums a program writes for every entry of both factors."""
DENSE, TWO_OF_FOUR, BITMASK = 0, 1, 2


@triton.jit
def load_weight(storage: tl.constexpr, values, index, offsets, row, column, valid, seen, n: tl.constexpr):
    """A tile of W, and for a bit mask how many values of each row lie before the next tile."""
    if storage == 0:
        return tl.load(values + row[:, None] * n + column[None, :], mask=valid, other=0.0), seen
    if storage == 1:
        group, lane = column // 4, column % 4
        byte = tl.load(index + row[:, None] * ((n + 7) // 8) + (group // 2)[None, :], mask=valid, other=0)
        nibble = (byte.to(tl.int32) >> ((group % 2) * 4)[None, :]) & 15
        at = row[:, None] * (n // 2) + 2 * group[None, :]
        first = tl.load(values + at, mask=valid, other=0.0)
        second = tl.load(values + at + 1, mask=valid, other=0.0)
        zero = tl.zeros_like(first)
        return tl.where(lane == (nibble & 3), first, tl.where(lane == (nibble >> 2), second, zero)), seen
    byte = tl.load(index + row[:, None] * ((n + 7) // 8) + (column // 8)[None, :], mask=valid, other=0)
    kept = (byte.to(tl.int32) >> (column % 8)[None, :]) & 1
    at = seen[:, None] + tl.cumsum(kept, axis=1) - kept
    return tl.load(values + at, mask=valid & (kept == 1), other=0.0), seen + tl.sum(kept, axis=1)


@triton.jit
def take_rows(storage: tl.constexpr, offsets, first, start, stop, block_rows: tl.constexpr):
    """Rows from `first`, which of them lie before `stop`, and where the values of each begin in a bit mask.

    Row `start` stands in for those that do not.
    """
    row = first + tl.arange(0, block_rows)
    held = row < stop
    row = tl.where(held, row, start)
    return row, held, tl.load(offsets + row) if storage == 2 else row


@triton.jit
def build_kernel(
    values, index, offsets, alpha, beta, out, start, stop, height, scale, base,
    n: tl.constexpr, storage: tl.constexpr, work: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """out = base * W + s * W * beta * repeat(alpha) for block_rows rows."""
    first_row = start + tl.program_id(0).to(tl.int64) * block_rows
    row, held, seen = take_rows(storage, offsets, first_row, start, stop, block_rows)
    factor = tl.load(beta + row).to(work) * scale
    for first in range(0, n, block_columns):
        column = first + tl.arange(0, block_columns)
        valid = held[:, None] & (column < n)[None, :]
        w, seen = load_weight(storage, values, index, offsets, row, column, valid, seen, n)
        a = tl.load(alpha + (row // height)[:, None] * n + column[None, :], mask=valid, other=0.0).to(work)
        result = w.to(work) * (base + factor[:, None] * a)
        tl.store(
            out + (row - start)[:, None] * n + column[None, :], result.to(out.dtype.element_ty), mask=valid
        )


@triton.jit
def reduce_kernel(
    g, values, index, offsets, alpha, beta, row_sums, column_sums, start, stop, height, span, tiles,
    n: tl.constexpr, storage: tl.constexpr, work: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """row_sums = sum_c G W alpha, and per program column_sums = sum_i beta G W, for rows of one block j."""
    program = tl.program_id(0).to(tl.int64)
    block, tile = program // tiles, program % tiles
    first_row = start + block * span
    end = tl.minimum(first_row + span, stop)
    row, held, seen = take_rows(storage, offsets, first_row + tile * block_rows, start, end, block_rows)
    b = tl.load(beta + row, mask=held, other=0.0).to(work)
    along = tl.zeros([block_rows], dtype=work)
    for first in range(0, n, block_columns):
        column = first + tl.arange(0, block_columns)
        inside = column < n
        valid = held[:, None] & inside[None, :]
        w, seen = load_weight(storage, values, index, offsets, row, column, valid, seen, n)
        gradient = tl.load(g + (row - start)[:, None] * n + column[None, :], mask=valid, other=0.0)
        product = gradient.to(work) * w.to(work)
        a = tl.load(alpha + (first_row // height) * n + column, mask=inside, other=0.0).to(work)
        along += tl.sum(product * a[None, :], axis=1)
        tl.store(column_sums + program * n + column, tl.sum(product * b[:, None], axis=0), mask=inside)
    tl.store(row_sums + (row - start), along, mask=held)


@triton.jit
def low_rank_build_kernel(
    values, index, offsets, left, right, out, start, stop, base,
    rank: tl.constexpr, multiplier: tl.constexpr,
    n: tl.constexpr, storage: tl.constexpr, work: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """out = base * W + M * (left right) for block_rows rows; left (stop - start, rank), right (rank, n)."""
    first_row = start + tl.program_id(0).to(tl.int64) * block_rows
    row, held, seen = take_rows(storage, offsets, first_row, start, stop, block_rows)
    for first in range(0, n, block_columns):
        column = first + tl.arange(0, block_columns)
        inside = column < n
        valid = held[:, None] & inside[None, :]
        stored, seen = load_weight(storage, values, index, offsets, row, column, valid, seen, n)
        w = stored.to(work)
        change = tl.zeros([block_rows, block_columns], dtype=work)
        for k in range(rank):
            b = tl.load(left + (row - start) * rank + k)
            a = tl.load(right + k * n + column, mask=inside, other=0.0)
            change += b[:, None] * a[None, :]
        if multiplier == 2:
            result = w * (base + change)
        elif multiplier == 1:
            result = base * w + tl.where(w != 0, change, 0.0)
        else:
            result = base * w + change
        place = out + (row - start)[:, None] * n + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=valid)


@triton.jit
def low_rank_reduce_kernel(
    g, values, index, offsets, left, right, left_sums, right_sums, start, stop,
    rank: tl.constexpr, multiplier: tl.constexpr,
    n: tl.constexpr, storage: tl.constexpr, work: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """Of a tile of H = G * M: left_sums = H right^T by tile of columns, right_sums = left^T H by tile of rows."""
    tile, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, held, seen = take_rows(storage, offsets, start + tile * block_rows, start, stop, block_rows)
    column = chunk * block_columns + tl.arange(0, block_columns)
    inside = column < n
    valid = held[:, None] & inside[None, :]
    place = g + (row - start)[:, None] * n + column[None, :]
    h = tl.load(place, mask=valid, other=0.0).to(work)
    if multiplier != 0:
        if storage == 2:
            for passed in range(0, n, block_columns):
                before = passed + tl.arange(0, block_columns)
                earlier = held[:, None] & (before < chunk * block_columns)[None, :]
                place = index + row[:, None] * ((n + 7) // 8) + (before // 8)[None, :]
                byte = tl.load(place, mask=earlier, other=0)
                seen += tl.sum((byte.to(tl.int32) >> (before % 8)[None, :]) & 1, axis=1)
        stored, seen = load_weight(storage, values, index, offsets, row, column, valid, seen, n)
        w = stored.to(work)
        h = h * w if multiplier == 2 else tl.where(w != 0, h, 0.0)
    for k in range(rank):
        b = tl.load(left + (row - start) * rank + k, mask=held, other=0.0)
        a = tl.load(right + k * n + column, mask=inside, other=0.0)
        along = left_sums + (chunk * (stop - start) + row - start) * rank + k
        tl.store(along, tl.sum(h * a[None, :], axis=1), mask=held)
        tl.store(right_sums + (tile * rank + k) * n + column, tl.sum(h * b[:, None], axis=0), mask=inside)


def takes(adapted: AdaptedWeight, other: torch.dtype) -> bool:
    return True


low_rank_takes = takes


def tile(adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
    """`Kernels.tile` of SPP as one kernel."""
    if stop > start:
        kind, *storage = _storage(adapted.rows)
        alpha, beta = adapted.factors["spp_alpha"], adapted.factors["spp_beta"]
        grid = (triton.cdiv(stop - start, ROWS),)
        build_kernel[grid](
            *storage, alpha, beta, out, start, stop, adapted.group, cast(SPP, adapted.method).scale, base,
            storage=kind, **_constants(adapted, alpha.dtype),
        )  # fmt: skip


def pullback(adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]) -> None:
    """`Kernels.pullback` of SPP as one kernel and two short sums."""
    if stop == start:
        return
    alpha, beta, scale = (
        adapted.factors["spp_alpha"],
        adapted.factors["spp_beta"],
        cast(SPP, adapted.method).scale,
    )
    kind, *storage = _storage(adapted.rows)
    # A range is a whole number of alpha's row blocks, or lies within one.
    height, span = adapted.group, min(adapted.group, stop - start)
    blocks, tiles = -(-(stop - start) // span), triton.cdiv(span, ROWS)
    work = torch.promote_types(torch.float32, torch.promote_types(alpha.dtype, adapted.rows.dtype))
    row_sums = torch.empty(stop - start, dtype=work, device=grad.device)
    column_sums = torch.empty(blocks, tiles, alpha.shape[1], dtype=work, device=grad.device)
    reduce_kernel[(blocks * tiles,)](
        grad, *storage, alpha, beta, row_sums, column_sums, start, stop, height, span, tiles,
        storage=kind, **_constants(adapted, alpha.dtype),
    )  # fmt: skip
    dalpha, dbeta = grads["spp_alpha"], grads["spp_beta"]
    dbeta[start:stop] += (row_sums * scale).unsqueeze(1).to(dbeta.dtype)
    first = start // height
    dalpha[first : first + blocks] += (column_sums.sum(1) * scale).to(dalpha.dtype)


def low_rank_tile(
    adapted: AdaptedWeight,
    start: int,
    stop: int,
    multiplier: int,
    base: float,
    b: Tensor,
    a: Tensor,
    out: Tensor,
) -> None:
    """Rows start..stop of base * W + M * (B A) into `out` as one kernel; b (stop - start, r) and a (r, n)."""
    if stop > start:
        kind, *storage = _storage(adapted.rows)
        grid = (triton.cdiv(stop - start, ROWS),)
        low_rank_build_kernel[grid](
            *storage, b.contiguous(), a.contiguous(), out, start, stop, base,
            rank=len(a), multiplier=multiplier, storage=kind, **_constants(adapted, a.dtype),
        )  # fmt: skip


def low_rank_pullback(
    adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, multiplier: int, b: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """(G * M) A^T (stop - start, r) and B^T (G * M) (r, n) of rows start..stop, as one kernel and two sums."""
    (rank, n), rows = a.shape, stop - start
    tiles, chunks = triton.cdiv(rows, LOW_RANK_ROWS), triton.cdiv(n, LOW_RANK_COLUMNS)
    left, right = a.new_empty(chunks, rows, rank), a.new_empty(tiles, rank, n)
    if rows:
        kind, *storage = _storage(adapted.rows)
        constants = _constants(adapted, a.dtype)
        constants |= {"block_rows": LOW_RANK_ROWS, "block_columns": LOW_RANK_COLUMNS}
        low_rank_reduce_kernel[(tiles, chunks)](
            grad.contiguous(), *storage, b.contiguous(), a.contiguous(), left, right, start, stop,
            rank=rank, multiplier=multiplier, storage=kind, **constants,
        )  # fmt: skip
    return left.sum(0), right.sum(0)


def _storage(rows: Rows) -> tuple[int, Tensor, Tensor, Tensor]:
    """Kind, values, index and offsets; the values stand in for what a storage lacks."""
    if isinstance(rows, PackedRowsBitmask):
        return BITMASK, rows.values, rows.bits, rows.offsets
    if isinstance(rows, PackedRows2of4):
        return TWO_OF_FOUR, rows.values, rows.positions, rows.values
    if isinstance(rows, DenseRows):
        return DENSE, rows.weight.contiguous(), rows.weight, rows.weight
    raise TypeError(f"no kernel reads {type(rows).__name__}")


def _constants(adapted: AdaptedWeight, factors: torch.dtype) -> dict[str, Any]:
    double = torch.float64 in (adapted.rows.dtype, factors)
    return {
        "n": adapted.rows.shape[1],
        "work": tl.float64 if double else tl.float32,
        "block_rows": ROWS,
        "block_columns": COLUMNS,
    }
