"""Matrix products that skip the zeros of a 2:4 weight, as machine code for CPUs with AVX-512.

`kept_gradient` is G = dYᵀ X at the positions where W is non-zero, half of the dense product's multiply-adds. It takes
any weight of which no 16 consecutive columns, counted from a multiple of 16, hold more than 8 non-zeros.

X and dY are laid out as columns, `BLOCK` bytes of the batch a piece. A panel of 16 columns of X then lies in the first
cache while rows of dY pass by: each row takes its 8 kept columns of the panel as operands straight from there, into 8
registers of partial sums, so that the multiply-adds set the pace. Sums are in float32, in a fixed order whatever the
number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from torch import Tensor

from spp_fx.adapters.rows import workspace
from spp_fx.parallel import on_torch_threads
from spp_fx.sparsity.compiled_scan import compile_assembly

BLOCK = 1024
"""Bytes of the batch that a piece of a column holds: 16 columns of a panel are half of a first cache of 32 KiB."""
ROWS = 256
"""Rows of G that a thread works on at a time: their part of dY stays within the second cache."""
PANEL, KEPT, LANES = 16, 8, 16
MOST_BATCH = 2048
"""Rows of the batch that are laid out at once; bounds the copies."""
LEAST_BATCH = 64
LOOKED_AT = 8
"""Rows of a weight that are looked at before it is unpacked and X and dY are laid out: unstructured ones are too dense
there already."""

_ELEMENTS = {torch.float32: ("float", "f32"), torch.bfloat16: ("bfloat", "bf16")}
_VECTOR = "<16 x float>"


def takes(x: Tensor, grad_y: Tensor) -> bool:
    """Whether `kept_gradient` is made for activations of these shapes and types, on this CPU."""
    features = _features()
    return (
        x.dtype in _ELEMENTS
        and grad_y.dtype == x.dtype
        and x.device.type == "cpu"
        and len(x) >= LEAST_BATCH
        and x.shape[1] % PANEL == 0
        and grad_y.shape[1] % PANEL == 0
        and features.get("avx512f", False)
        and features.get("avx512bw", False)
        and (x.dtype == torch.float32 or features.get("avx512bf16", False))
    )


def may_take(weight: Tensor) -> bool:
    """Whether rows of a weight, the first LOOKED_AT, are sparse enough; `kept_gradient` looks at all of them."""
    return int(weight.ne(0).reshape(-1, PANEL).sum(1).max()) <= KEPT


def kept_gradient(x: Tensor, grad_y: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Write grad_yᵀ x into out where weight is non-zero, and zero elsewhere.

    Args:
        x: (b, n), at most MOST_BATCH rows, and of a kind that `takes` takes, as all others.
        grad_y: (b, m).
        weight: (m, n).
        out: (m, n) of x's dtype.

    Returns:
        False if the weight is too dense in some place; out then holds nothing of use.
    """
    (b, n), m = x.shape, grad_y.shape[1]
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if len(x) > MOST_BATCH or weight.shape != (m, n) or out.shape != (m, n) or len(grad_y) != b:
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, grad_y, weight, out))
        raise ValueError(f"x, grad_y, weight and out of shapes {shapes} do not fit together")
    size = x.dtype.itemsize
    columns, rows = _columns("columns of x", x, KEPT), _columns("columns of grad_y", grad_y, 0)
    kind = _ELEMENTS[x.dtype]
    job = [
        columns.data_ptr(), (n + KEPT) * BLOCK, rows.data_ptr(), m * BLOCK, len(columns),
        -(-(b * size - (len(columns) - 1) * BLOCK) // 64), weight.data_ptr(), weight.stride(0) * weight.itemsize,
        out.data_ptr(), out.stride(0) * size, n // PANEL, m,
    ]  # fmt: skip
    return _run(_kernel("kept", *kind, 8 * weight.itemsize), -(-m // ROWS), job)


def _columns(name: str, x: Tensor, spare: int) -> Tensor:
    """x (b, n) as (blocks, n + spare, BLOCK bytes of elements), with zeros up to a whole number of 64 bytes."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (b, n), size = x.shape, x.dtype.itemsize
    length = BLOCK // size
    blocks = -(-b // length)
    held = workspace(name, blocks * (n + spare) + 1, length, x.dtype, x.device).view(-1)
    start = -held.data_ptr() % 64 // size
    out = held[start : start + blocks * (n + spare) * length].view(blocks, n + spare, length)
    whole = b // LANES * LANES
    job = [
        x.data_ptr(),
        x.stride(0) * size,
        whole // LANES,
        out.data_ptr(),
        (n + spare) * BLOCK,
        length // LANES,
    ]
    _run(_kernel("transpose", f"i{8 * size}"), n // LANES, job)
    if whole < b:
        last, chunk = out[-1, :n], 64 // size
        first, end = whole - (blocks - 1) * length, b - (blocks - 1) * length
        last[:, first:end] = x[whole:].t()
        last[:, end : -(-end // chunk) * chunk] = 0
    elif b * size % 64:
        end = b - (blocks - 1) * length
        out[-1, :n, end : end + LANES] = 0
    return out


@cache
def _features() -> dict[str, bool]:
    """What this CPU has, as LLVM names it; nothing where LLVM cannot tell."""
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:
        return {}


def _run(kernel: Any, count: int, job: Sequence[int]) -> bool:
    """Call `kernel` for each of `count` pieces of a job, on torch's number of threads; whether none failed."""
    state = np.array([0, 0, count, *job], np.int64)
    on_torch_threads(kernel, state.ctypes.data, min(torch.get_num_threads(), count))
    return not state[1]


@cache
def _kernel(name: str, *kind: Any) -> Any:
    """A kernel as machine code, to be called with the address of a job's state; a call lets other threads run."""
    body = {"kept": _kept, "transpose": _transpose}[name](*kind)
    return compile_assembly(_PIECES + body, "work", ctypes.CFUNCTYPE(None, ctypes.c_void_p))


# `piece` is called with the number of a piece and the job's own numbers; it returns 1 if it cannot do it. Threads take
# pieces one by one: state holds how many were taken, whether one failed, how many there are, and the job.
_PIECES = """
define void @work(ptr %state) {
entry:
  %failed = getelementptr i64, ptr %state, i64 1
  %count.at = getelementptr i64, ptr %state, i64 2
  %count = load i64, ptr %count.at
  %job = getelementptr i64, ptr %state, i64 3
  br label %take

take:
  %piece = atomicrmw add ptr %state, i64 1 monotonic
  %over = icmp sge i64 %piece, %count
  %lost = load atomic i64, ptr %failed monotonic, align 8
  %stop.lost = icmp ne i64 %lost, 0
  %stop = or i1 %over, %stop.lost
  br i1 %stop, label %end, label %do

do:
  %refused = call i64 @piece(i64 %piece, ptr %job)
  %bad = icmp ne i64 %refused, 0
  br i1 %bad, label %fail, label %take

fail:
  store atomic i64 1, ptr %failed monotonic, align 8
  ret void

end:
  ret void
}
"""


def _fields(names: str) -> str:
    """Read a job's numbers: pointers are named with a star."""
    lines: list[str] = []
    for index, name in enumerate(names.split()):
        kind, name = ("ptr", name[1:]) if name.startswith("*") else ("i64", name)
        lines.append(f"  %{name}.field = getelementptr i64, ptr %job, i64 {index}")
        lines.append(f"  %{name} = load {kind}, ptr %{name}.field")
    return "\n".join(lines)


def _shuffle(name: str, a: str, b: str, indices: Sequence[int], kind: str = "float", width: int = 16) -> str:
    chosen = ", ".join(f"i32 {index}" for index in indices)
    vectors = f"<{width} x {kind}> %{a}, <{width} x {kind}> %{b}"
    return f"  %{name} = shufflevector {vectors}, <{len(indices)} x i32> <{chosen}>"


def _transpose(element: str) -> str:
    """A piece is 16 columns of x; the transpose of 16 x 16 elements is 4 rounds of interleaving its halves."""
    size = int(element[1:]) // 8
    vector = f"<16 x {element}>"
    low = [index for lane in range(8) for index in (lane, lane + 16)]
    lines = [
        "define i64 @piece(i64 %piece, ptr %job) {\nentry:",
        _fields("*x pitch tiles *out block length"),
        f"  %column = shl i64 %piece, {4 + size // 2}",
        "  %x.first = getelementptr i8, ptr %x, i64 %column",
        f"  %rows.at = mul i64 %piece, {16 * BLOCK}",
        "  %out.first = getelementptr i8, ptr %out, i64 %rows.at",
        "  %any = icmp sgt i64 %tiles, 0\n  br i1 %any, label %tile, label %end\ntile:",
        "  %i = phi i64 [0, %entry], [%i.next, %tile]",
        "  %row = shl i64 %i, 4\n  %from.at = mul i64 %row, %pitch",
        "  %from.0 = getelementptr i8, ptr %x.first, i64 %from.at",
        f"  %v.0.0 = load {vector}, ptr %from.0, align 1",
    ]
    for k in range(1, 16):
        lines.append(f"  %from.{k} = getelementptr i8, ptr %from.{k - 1}, i64 %pitch")
        lines.append(f"  %v.0.{k} = load {vector}, ptr %from.{k}, align 1")
    for turn in range(4):
        for k in range(8):
            halves = f"v.{turn}.{k}", f"v.{turn}.{k + 8}"
            lines.append(_shuffle(f"v.{turn + 1}.{2 * k}", *halves, low, element))
            lines.append(_shuffle(f"v.{turn + 1}.{2 * k + 1}", *halves, [i + 8 for i in low], element))
    lines += [
        "  %block.i = udiv i64 %i, %length\n  %in.block = urem i64 %i, %length",
        "  %block.at = mul i64 %block.i, %block",
        f"  %in.at = shl i64 %in.block, {4 + size // 2}\n  %to.at = add i64 %block.at, %in.at",
        "  %to = getelementptr i8, ptr %out.first, i64 %to.at",
    ]
    for k in range(16):
        lines.append(f"  %to.{k} = getelementptr i8, ptr %to, i64 {k * BLOCK}")
        lines.append(f"  store {vector} %v.4.{k}, ptr %to.{k}, align {16 * size}")
    lines.append("  %i.next = add i64 %i, 1\n  %again = icmp slt i64 %i.next, %tiles")
    lines.append("  br i1 %again, label %tile, label %end\nend:\n  ret i64 0\n}")
    return "\n".join(lines)


def _kept(element: str, kind: str, bits: int) -> str:
    """A piece is ROWS rows of G, panel by panel; bits is the width of the weight's elements."""
    operand = _VECTOR if kind == "f32" else "<32 x bfloat>"
    size = 4 if kind == "f32" else 2

    def multiply(k: int) -> str:
        if kind == "f32":
            return f"call {_VECTOR} @llvm.fma.v16f32({_VECTOR} %dy.v, {_VECTOR} %x.{k}.v, {_VECTOR} %sum.{k})"
        vectors = f"{operand} %dy.v, {operand} %x.{k}.v"
        return f"call {_VECTOR} @llvm.x86.avx512bf16.dpbf16ps.512({_VECTOR} %sum.{k}, {vectors})"

    kept = "\n".join(
        f"""  %at.{k} = call i64 @llvm.cttz.i64(i64 %left.{k}, i1 true)
  %less.{k} = sub i64 %left.{k}, 1
  %left.{k + 1} = and i64 %left.{k}, %less.{k}
  %offset.{k} = mul i64 %at.{k}, {BLOCK}
  %x.{k} = getelementptr i8, ptr %x.block, i64 %offset.{k}"""
        for k in range(KEPT)
    )
    sums = "\n".join(
        f"  %sum.{k} = phi {_VECTOR} [zeroinitializer, %start], [%next.{k}, %turn]" for k in range(KEPT)
    )
    products = "\n".join(
        f"""  %x.{k}.at = getelementptr i8, ptr %x.{k}, i64 %here
  %x.{k}.v = load {operand}, ptr %x.{k}.at, align 64
  %next.{k} = {multiply(k)}"""
        for k in range(KEPT)
    )
    narrow = (
        "bitcast <16 x float> %wide to <16 x float>"
        if size == 4
        else f"fptrunc {_VECTOR} %wide to <16 x bfloat>"
    )
    return f"""
declare {_VECTOR} @llvm.x86.avx512.mask.expand.v16f32({_VECTOR}, {_VECTOR}, <16 x i1>)
declare {_VECTOR} @llvm.x86.avx512bf16.dpbf16ps.512({_VECTOR}, <32 x bfloat>, <32 x bfloat>)
declare {_VECTOR} @llvm.fma.v16f32({_VECTOR}, {_VECTOR}, {_VECTOR})
declare i16 @llvm.ctpop.i16(i16)
declare i64 @llvm.cttz.i64(i64, i1)

define i64 @piece(i64 %piece, ptr %job) {{
entry:
{_fields("*x x.pitch *dy dy.pitch blocks last *w w.pitch *g g.pitch panels m")}
  %masks = alloca [{ROWS} x i16], align 64
  %totals = alloca [{ROWS * KEPT} x float], align 64
  %row.first = mul i64 %piece, {ROWS}
  %rows.left = sub i64 %m, %row.first
  %part = icmp slt i64 %rows.left, {ROWS}
  %rows = select i1 %part, i64 %rows.left, i64 {ROWS}
  %dy.offset = mul i64 %row.first, {BLOCK}
  %dy.first = getelementptr i8, ptr %dy, i64 %dy.offset
  %w.offset = mul i64 %row.first, %w.pitch
  %w.first = getelementptr i8, ptr %w, i64 %w.offset
  %g.offset = mul i64 %row.first, %g.pitch
  %g.first = getelementptr i8, ptr %g, i64 %g.offset
  br label %panel

panel:
  %p = phi i64 [0, %entry], [%p.next, %panel.end]
  %w.column = mul i64 %p, {PANEL * bits // 8}
  %w.panel = getelementptr i8, ptr %w.first, i64 %w.column
  %g.column = mul i64 %p, {PANEL * size}
  %g.panel = getelementptr i8, ptr %g.first, i64 %g.column
  %x.column = mul i64 %p, {PANEL * BLOCK}
  %x.panel = getelementptr i8, ptr %x, i64 %x.column
  br label %scan

scan:
  %s = phi i64 [0, %panel], [%s.next, %scan.next]
  %s.offset = mul i64 %s, %w.pitch
  %s.at = getelementptr i8, ptr %w.panel, i64 %s.offset
  %s.values = load <16 x i{bits}>, ptr %s.at, align 1
  %s.magnitudes = shl <16 x i{bits}> %s.values, splat (i{bits} 1)
  %s.nonzero = icmp ne <16 x i{bits}> %s.magnitudes, zeroinitializer
  %s.mask = bitcast <16 x i1> %s.nonzero to i16
  %s.to = getelementptr i16, ptr %masks, i64 %s
  store i16 %s.mask, ptr %s.to
  %s.count = call i16 @llvm.ctpop.i16(i16 %s.mask)
  %s.many = icmp ugt i16 %s.count, {KEPT}
  br i1 %s.many, label %refuse, label %scan.next
scan.next:
  %s.next = add i64 %s, 1
  %s.more = icmp slt i64 %s.next, %rows
  br i1 %s.more, label %scan, label %block

block:
  %j = phi i64 [0, %scan.next], [%j.next, %block.end]
  %first = icmp eq i64 %j, 0
  %j.next = add i64 %j, 1
  %final = icmp eq i64 %j.next, %blocks
  %turns = select i1 %final, i64 %last, i64 {BLOCK // 64}
  %x.block.offset = mul i64 %j, %x.pitch
  %x.block = getelementptr i8, ptr %x.panel, i64 %x.block.offset
  %dy.block.offset = mul i64 %j, %dy.pitch
  %dy.block = getelementptr i8, ptr %dy.first, i64 %dy.block.offset
  br label %start

; What lies behind the last kept column of a row is summed as well, in spare columns, and left out when it is written.
start:
  %r = phi i64 [0, %block], [%r.next, %row.end]
  %mask.at = getelementptr i16, ptr %masks, i64 %r
  %mask = load i16, ptr %mask.at
  %mask.wide = zext i16 %mask to i64
  %left.0 = or i64 %mask.wide, {(1 << KEPT) - 1 << PANEL}
{kept}
  %dy.offset.r = mul i64 %r, {BLOCK}
  %dy.row = getelementptr i8, ptr %dy.block, i64 %dy.offset.r
  br label %turn

turn:
  %t = phi i64 [0, %start], [%t.next, %turn]
{sums}
  %here = shl i64 %t, 6
  %dy.at.t = getelementptr i8, ptr %dy.row, i64 %here
  %dy.v = load {operand}, ptr %dy.at.t, align 64
{products}
  %t.next = add i64 %t, 1
  %t.more = icmp slt i64 %t.next, %turns
  br i1 %t.more, label %turn, label %reduce

reduce:
{_eight_sums()}
  %total.offset = mul i64 %r, {KEPT}
  %total.at = getelementptr float, ptr %totals, i64 %total.offset
  br i1 %first, label %summed, label %more
more:
  %before = load <8 x float>, ptr %total.at, align 32
  %both = fadd <8 x float> %before, %eight
  br label %summed
summed:
  %total = phi <8 x float> [%eight, %reduce], [%both, %more]
  br i1 %final, label %write, label %keep
keep:
  store <8 x float> %total, ptr %total.at, align 32
  br label %row.end
write:
{_shuffle("sixteen", "total", "total", [*range(8), *range(8)], width=8)}
  %nonzero = bitcast i16 %mask to <16 x i1>
  %wide = call {_VECTOR} @llvm.x86.avx512.mask.expand.v16f32(
      {_VECTOR} %sixteen, {_VECTOR} zeroinitializer, <16 x i1> %nonzero)
  %result = {narrow}
  %g.offset.r = mul i64 %r, %g.pitch
  %g.at.r = getelementptr i8, ptr %g.panel, i64 %g.offset.r
  store <16 x {element}> %result, ptr %g.at.r, align 1
  br label %row.end

row.end:
  %r.next = add i64 %r, 1
  %r.more = icmp slt i64 %r.next, %rows
  br i1 %r.more, label %start, label %block.end
block.end:
  br i1 %final, label %panel.end, label %block
panel.end:
  %p.next = add i64 %p, 1
  %p.more = icmp slt i64 %p.next, %panels
  br i1 %p.more, label %panel, label %end
end:
  ret i64 0
refuse:
  ret i64 1
}}
"""


def _eight_sums() -> str:
    """%eight (8) from %next.0 to %next.7: the sum of each over its 16 lanes."""
    pairs = [index for lane in range(0, 16, 4) for index in (lane, lane + 16, lane + 1, lane + 17)]
    fours = [index for lane in range(0, 16, 4) for index in (lane, lane + 1, lane + 16, lane + 17)]
    lines: list[str] = []

    def add(name: str, a: str, b: str, low: Sequence[int], distance: int) -> None:
        lines.append(_shuffle(f"{name}.low", a, b, low))
        lines.append(_shuffle(f"{name}.high", a, b, [index + distance for index in low]))
        lines.append(f"  %{name} = fadd <{len(low)} x float> %{name}.low, %{name}.high")

    for k in range(4):
        add(f"pair.{k}", f"next.{2 * k}", f"next.{2 * k + 1}", pairs, 2)
    for k in range(2):
        add(f"four.{k}", f"pair.{2 * k}", f"pair.{2 * k + 1}", fours, 2)
    add("halves", "four.0", "four.1", [*range(8), *range(16, 24)], 8)
    add("eight", "halves", "halves", [0, 1, 2, 3, 8, 9, 10, 11], 4)
    return "\n".join(lines)
