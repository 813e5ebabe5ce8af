"""Compiled loops for the CPU over tiles of low-rank updates, of a bfloat16 or float32 W and float32 factors.

A few rows are treated at a time: B A of them is made, or their gradients are multiplied, in a strip that stays in the
cache and is met there by the rows of W. The products keep a block of 4 rows in vector registers, which a loop that
numba vectorizes by itself does not; it takes three times as long.
"""

# Kernels are a language of their own: their parameters have no Python types.
# pyright: reportMissingParameterType=false, reportMissingTypeStubs=false, reportCallIssue=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spp_fx.adapters.cpu import (
    FEW_THREADS,
    check_range,
    narrow,
    row_buffer,
    row_of,
    storage_of,
    widen,
)
from spp_fx.adapters.low_rank import MASK, ONE, WEIGHT
from spp_fx.compiled import compiled
from spp_fx.parallel import on_torch_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spp_fx.adapters.op import AdaptedWeight

ZERO = np.float32(0)
ROWS = 4
STRIP = 8
"""Rows whose gradients are multiplied at once: more of them add up before dA is read and written."""
PARTS = 4
"""Into so many parts rows are divided for threads."""


def _vectors() -> tuple[int, int]:
    """How many float32 a vector register holds, and how many registers of a row a block takes."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot read them
        features = {}
    if features.get("avx512f"):
        return 16, 4
    return (8, 2) if features.get("avx2") else (4, 4)


LANES, VECTORS = _vectors()
COLUMNS = LANES * VECTORS
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


def _number(value: int) -> Any:
    return ir.Constant(I64, value)


def _at(context, builder, kind, array, i, j):
    """The address of an element of a matrix, and the elements of one of its rows."""
    matrix = context.make_array(kind)(context, builder, array)
    width = cgutils.unpack_tuple(builder, matrix.shape)[1]
    return builder.gep(matrix.data, [builder.add(builder.mul(i, width), j)]), width


def _vector_at(builder, address, index):
    return builder.bitcast(builder.gep(address, [index]), VECTOR.as_pointer())


def _load(builder, address, index):
    value = builder.load(_vector_at(builder, address, index))
    value.align = 4
    return value


def _splat(builder, value):
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(I32, 0))
    first = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), first)


def _add_product(builder, a, b, total):
    """total += a * b, fused where the CPU can."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)


def _accumulators(builder, rows, columns):
    made = [[cgutils.alloca_once(builder, VECTOR) for _ in range(columns)] for _ in range(rows)]
    for row in made:
        for each in row:
            builder.store(ir.Constant(VECTOR, [0.0] * LANES), each)
    return made


@intrinsic
def multiply_block(typing, left, i, j, right, count, c, out, o, add):
    """The block of `out` at o, c = left[i : i + ROWS, j : j + count] right[:count, c : c + COLUMNS]; or adds it.

    Matrices are contiguous, and nothing checks bounds.
    """

    def generate(context, builder, signature, arguments):
        left, i, j, right, count, c, out, o, add = arguments
        kinds = signature.args
        a, a_width = _at(context, builder, kinds[0], left, i, j)
        b, b_width = _at(context, builder, kinds[3], right, _number(0), c)
        target, width = _at(context, builder, kinds[6], out, o, c)
        totals = _accumulators(builder, ROWS, VECTORS)
        places = [
            [
                builder.add(builder.mul(_number(row), width), _number(LANES * vector))
                for vector in range(VECTORS)
            ]
            for row in range(ROWS)
        ]
        with builder.if_then(add):
            for row in range(ROWS):
                for vector in range(VECTORS):
                    builder.store(_load(builder, target, places[row][vector]), totals[row][vector])
        with cgutils.for_range(builder, count) as loop:
            start = builder.mul(loop.index, b_width)
            columns = [
                _load(builder, b, builder.add(start, _number(LANES * vector))) for vector in range(VECTORS)
            ]
            for row in range(ROWS):
                index = builder.add(builder.mul(_number(row), a_width), loop.index)
                value = _splat(builder, builder.load(builder.gep(a, [index])))
                for vector in range(VECTORS):
                    _add_product(builder, value, columns[vector], totals[row][vector])
        for row in range(ROWS):
            for vector in range(VECTORS):
                stored = builder.store(
                    builder.load(totals[row][vector]), _vector_at(builder, target, places[row][vector])
                )
                stored.align = 4
        return context.get_dummy_value()

    index = types.int64
    return types.none(left, index, index, right, index, index, out, index, types.boolean), generate


@intrinsic
def dot_block(typing, first, i, second, j, out, o):
    """out[o : o + ROWS, j : j + VECTORS] = first[i : i + ROWS] second[j : j + VECTORS]^T; rows of whole vectors."""

    def generate(context, builder, signature, arguments):
        first, i, second, j, out, o = arguments
        kinds = signature.args
        a, a_width = _at(context, builder, kinds[0], first, i, _number(0))
        b, b_width = _at(context, builder, kinds[2], second, j, _number(0))
        target, width = _at(context, builder, kinds[4], out, o, j)
        totals = _accumulators(builder, ROWS, VECTORS)
        with cgutils.for_range(builder, builder.udiv(a_width, _number(LANES))) as loop:
            start = builder.mul(loop.index, _number(LANES))
            rows = [
                _load(builder, a, builder.add(builder.mul(_number(row), a_width), start))
                for row in range(ROWS)
            ]
            columns = [
                _load(builder, b, builder.add(builder.mul(_number(column), b_width), start))
                for column in range(VECTORS)
            ]
            for row in range(ROWS):
                for column in range(VECTORS):
                    _add_product(builder, rows[row], columns[column], totals[row][column])
        kind = ir.FunctionType(F32, [F32, VECTOR])
        total_of = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        for row in range(ROWS):
            for column in range(VECTORS):
                total = builder.call(
                    total_of,
                    [ir.Constant(F32, -0.0), builder.load(totals[row][column])],
                    fastmath=("reassoc",),
                )
                index = builder.add(builder.mul(_number(row), width), _number(column))
                builder.store(total, builder.gep(target, [index]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(first, index, second, index, out, index), generate


@partial(compiled, error_model="numpy")
def tile(storage, values, index, offsets, multiplier, base, left, right, buffer, start, stop, out):
    """Rows start..stop of base * W + M * (left right); left (rows, r) and right (r, n) are padded."""
    nibbles = np.empty(2 * index.shape[1], np.uint8)
    strip = np.empty((ROWS, right.shape[1]), np.float32)
    for first in range(start, stop, ROWS):
        for c in range(0, right.shape[1], COLUMNS):
            multiply_block(left, first, 0, right, right.shape[0], c, strip, 0, False)
        for i in range(first, min(first + ROWS, stop)):
            row = row_of(storage, values, index, offsets, i, nibbles, buffer)
            change, target = strip[i - first], out[i]
            if multiplier == WEIGHT:
                for c in range(row.shape[0]):
                    target[c] = narrow(widen(row[c]) * (base + change[c]), target[c])
            elif multiplier == MASK:
                for c in range(row.shape[0]):
                    w = widen(row[c])
                    target[c] = narrow(base * w + (change[c] if w != ZERO else ZERO), target[c])
            else:
                for c in range(row.shape[0]):
                    target[c] = narrow(base * widen(row[c]) + change[c], target[c])


@partial(compiled, error_model="numpy")
def pullback(storage, values, index, offsets, multiplier, left, right, buffer, start, stop, g, dleft, dright):
    """Of rows start..stop: dleft = (G * M) right^T, and dright += left^T (G * M); left (r, rows) is transposed."""
    nibbles = np.empty(2 * index.shape[1], np.uint8)
    strip = np.zeros((STRIP, right.shape[1]), np.float32)
    rank, width = right.shape
    for first in range(start, stop, STRIP):
        last = min(first + STRIP, stop)
        for i in range(first, last):
            gradient, target = g[i], strip[i - first]
            if multiplier == ONE:
                for c in range(gradient.shape[0]):
                    target[c] = widen(gradient[c])
                continue
            row = row_of(storage, values, index, offsets, i, nibbles, buffer)
            if multiplier == WEIGHT:
                for c in range(row.shape[0]):
                    target[c] = widen(row[c]) * widen(gradient[c])
            else:
                for c in range(row.shape[0]):
                    target[c] = widen(gradient[c]) if widen(row[c]) != ZERO else ZERO
        strip[last - first :] = ZERO
        for i in range(0, STRIP, ROWS):
            for k in range(0, rank, VECTORS):
                dot_block(strip, i, right, k, dleft, first + i)
        for k in range(0, rank, ROWS):
            for c in range(0, width, COLUMNS):
                multiply_block(left, k, first, strip, STRIP, c, dright, k, True)


def low_rank_takes(adapted: AdaptedWeight, other: torch.dtype) -> bool:
    """Whether the loops take these types, and are faster than torch; `other` is the dtype of W' or of G."""
    import torch

    return (
        torch.get_num_threads() <= FEW_THREADS
        and adapted.rows.dtype in (torch.bfloat16, torch.float32)
        and all(factor.dtype in (torch.bfloat16, torch.float32) for factor in adapted.factors.values())
        and other in (torch.bfloat16, torch.float32)
    )


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
    """Write rows start..stop of base * W + M * (B A) into `out`.

    Args:
        multiplier: M, one of `low_rank.MULTIPLIERS`.
        b: (stop - start, r), float32.
        a: (r, n), float32.
    """
    from spp_fx.sparsity.packing import as_array

    check_range(adapted, out, start, stop)
    rows, n = out.shape
    left, right = _padded(as_array(b), _up(rows, ROWS), len(a)), _padded(as_array(a), len(a), _up(n, COLUMNS))
    weight, target = storage_of(adapted, start, stop), as_array(out)

    def run(part: int, first: int, last: int) -> None:
        buffer = row_buffer(adapted)
        tile(*weight, multiplier, np.float32(base), left, right, buffer, first, last, target)

    _on_threads(run, rows)


def low_rank_pullback(
    adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, multiplier: int, b: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """(G * M) A^T (stop - start, r) and B^T (G * M) (r, n) of rows start..stop, float32; arguments as above."""
    import torch

    from spp_fx.sparsity.packing import as_array

    check_range(adapted, grad, start, stop)
    rows, n = grad.shape
    height, width = _up(len(a), ROWS), _up(n, COLUMNS)
    left, right = (
        _padded(as_array(b.t().contiguous()), height, _up(rows, STRIP)),
        _padded(as_array(a), height, width),
    )
    weight, g = storage_of(adapted, start, stop), as_array(grad.contiguous())
    dleft = np.empty((_up(rows, STRIP), height), np.float32)
    dright = np.zeros((PARTS, height, width), np.float32)

    def run(part: int, first: int, last: int) -> None:
        buffer = row_buffer(adapted)
        pullback(*weight, multiplier, left, right, buffer, first, last, g, dleft, dright[part])

    _on_threads(run, rows)
    return torch.from_numpy(dleft)[:rows, : len(a)], torch.from_numpy(dright.sum(0))[: len(a), :n]


def _on_threads(run: Callable[[int, int, int], None], rows: int) -> None:
    """Call `run` with each of PARTS parts of the rows and its range, on as many of torch's threads as there are.

    Parts do not depend on the number of threads, and so neither do sums.
    """
    import torch

    step = max(STRIP, _up(-(-rows // PARTS), STRIP))
    # The iterator of a list is safe to share between threads.
    parts = iter([(part, first, min(first + step, rows)) for part, first in enumerate(range(0, rows, step))])
    failures: list[BaseException] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def work(_: object) -> None:
        try:
            while (part := next(parts, None)) is not None:
                run(*part)
        except BaseException as error:  # noqa: BLE001 - ctypes would drop it, Ctrl-C too, and leave rows unwritten
            failures.append(error)

    on_torch_threads(work, None, min(torch.get_num_threads(), PARTS))
    if failures:
        raise failures[0]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(array: Any, rows: int, columns: int) -> Any:
    """A contiguous float32 matrix of at least so many rows and columns; what is added is zero."""
    if array.shape == (rows, columns):
        return np.ascontiguousarray(array)
    padded = np.zeros((rows, columns), np.float32)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
