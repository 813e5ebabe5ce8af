"""`kernels.scan_elements` and `kernels.count_in_words` as machine code, which llvmlite compiles from LLVM assembly
in about 20 ms each.

A comparison of 64 lanes whose result is read as a 64-bit integer is one or two instructions on AVX-512 and a few
more on other CPUs, so one definition serves every CPU. numba cannot express it, and importing numba
takes longer than reading a gigabyte.
"""

import ctypes
import sys
from typing import Any

import numpy as np
from llvmlite import binding
from numpy.typing import NDArray

from spp_fx.sparsity.kernels import (
    CountInWords,
    ElementType,
    FieldSums,
    ScanElements,
    count_in_words,
    scan_elements,
)

# 64 elements of W bits become one mask word in each turn. `found` receives how many are non-zero and how many are
# non-finite: those whose magnitude is `start` to `start + span - 1`, by one unsigned comparison that wraps around.
_SCAN_ELEMENTS = """
define void @scan(ptr %elements, i64 %words, ptr %rule, ptr %mask, ptr %found) {
entry:
  %rule.values = load <3 x iW>, ptr %rule, align 1
  %magnitude = shufflevector <3 x iW> %rule.values, <3 x iW> poison, <64 x i32> zeroinitializer
  %start = shufflevector <3 x iW> %rule.values, <3 x iW> poison, <64 x i32> splat (i32 1)
  %span = shufflevector <3 x iW> %rule.values, <3 x iW> poison, <64 x i32> splat (i32 2)
  br label %turn

turn:
  %i = phi i64 [0, %entry], [%i.next, %turn]
  %nonzeros = phi i64 [0, %entry], [%nonzeros.next, %turn]
  %nonfinites = phi i64 [0, %entry], [%nonfinites.next, %turn]

  %from = getelementptr <64 x iW>, ptr %elements, i64 %i
  %values = load <64 x iW>, ptr %from, align 1
  %magnitudes = and <64 x iW> %values, %magnitude
  %is.nonzero = icmp ne <64 x iW> %magnitudes, zeroinitializer
  %word = bitcast <64 x i1> %is.nonzero to i64
  %to = getelementptr i64, ptr %mask, i64 %i
  store i64 %word, ptr %to, align 1
  %ones = call i64 @llvm.ctpop.i64(i64 %word)
  %nonzeros.next = add i64 %nonzeros, %ones

  %past = sub <64 x iW> %magnitudes, %start
  %is.nonfinite = icmp ult <64 x iW> %past, %span
  %nonfinite = bitcast <64 x i1> %is.nonfinite to i64
  %more = call i64 @llvm.ctpop.i64(i64 %nonfinite)
  %nonfinites.next = add i64 %nonfinites, %more

  %i.next = add i64 %i, 1
  %again = icmp ult i64 %i.next, %words
  br i1 %again, label %turn, label %end

end:
  store i64 %nonzeros.next, ptr %found, align 8
  %second = getelementptr i64, ptr %found, i64 1
  store i64 %nonfinites.next, ptr %second, align 8
  ret void
}

declare i64 @llvm.ctpop.i64(i64)
"""

# Eight mask words a turn; `steps` are those of `kernels.count_in_words`.
_COUNT_IN_WORDS = """
define i64 @count(ptr %words, i64 %blocks) {
entry:
  br label %turn

turn:
  %i = phi i64 [0, %entry], [%i.next, %turn]
  %totals = phi <8 x i64> [zeroinitializer, %entry], [%totals.next, %turn]
  %from = getelementptr <8 x i64>, ptr %words, i64 %i
  %ones.1 = load <8 x i64>, ptr %from, align 1
STEPS
  %raised = add <8 x i64> %ones.GROUP, splat (i64 RAISE)
  %over = and <8 x i64> %raised, splat (i64 TOP)
  %counts = call <8 x i64> @llvm.ctpop.v8i64(<8 x i64> %over)
  %totals.next = add <8 x i64> %totals, %counts
  %i.next = add i64 %i, 1
  %again = icmp ult i64 %i.next, %blocks
  br i1 %again, label %turn, label %end

end:
  %total = call i64 @llvm.vector.reduce.add.v8i64(<8 x i64> %totals.next)
  ret i64 %total
}

declare <8 x i64> @llvm.ctpop.v8i64(<8 x i64>)
declare i64 @llvm.vector.reduce.add.v8i64(<8 x i64>)
"""
# Fields of SIZE bits become fields of TWICE the size.
_STEP = """
  %moved.SIZE = lshr <8 x i64> %ones.SIZE, splat (i64 SIZE)
  %upper.SIZE = and <8 x i64> %moved.SIZE, splat (i64 HALF)
  %lower.SIZE = and <8 x i64> %ones.SIZE, splat (i64 HALF)
  %ones.TWICE = add <8 x i64> %upper.SIZE, %lower.SIZE
"""

if sys.byteorder != "little":
    raise ImportError("mask words are written as little-endian")
try:
    binding.check_jit_execution()
except OSError as error:  # SELinux, for one, can forbid a process to run code that it made
    raise ImportError(str(error)) from error

_SCAN = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3])
_COUNT = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
_WORD = 64  # elements of one mask word


def compile_scan(itemsize: int) -> ScanElements:
    """`scan_elements` for elements of 1, 2, 4 or 8 bytes; a call lets other threads run."""
    machine_code = compile_assembly(_SCAN_ELEMENTS.replace("iW", f"i{8 * itemsize}"), "scan", _SCAN)

    def scan(elements: NDArray[Any], kind: ElementType, out: NDArray[np.uint8]) -> tuple[int, int]:
        words = elements.size // _WORD
        if elements.itemsize != itemsize or not elements.flags.c_contiguous or not out.flags.c_contiguous:
            raise ValueError(f"needs contiguous arrays and elements of {itemsize} bytes")
        if out.size < (elements.size + 7) // 8 or not out.flags.writeable:
            raise ValueError(f"a mask of {out.size} writable bytes is too small for {elements.size} elements")
        rule = (kind.magnitude, kind.non_finite_from, kind.non_finite_span)
        packed = b"".join(value.to_bytes(itemsize, "little") for value in rule)
        found = (ctypes.c_int64 * 2)()
        if words:
            machine_code(_address(elements), words, packed, _address(out), found)
        if elements.size % _WORD == 0:
            return found[0], found[1]
        rest = scan_elements(elements[words * _WORD :], kind, out[words * _WORD // 8 :])
        return found[0] + rest[0], found[1] + rest[1]

    return scan


def compile_count(group: int, kept: int) -> CountInWords:
    """`count_in_words` for one pattern; a call lets other threads run."""
    fields = FieldSums.of(group, kept)
    steps = "".join(
        _STEP.replace("SIZE", str(size)).replace("TWICE", str(2 * size)).replace("HALF", str(half))
        for size, half in fields.steps
    )
    assembly = _COUNT_IN_WORDS.replace("STEPS", steps).replace("GROUP", str(group))
    assembly = assembly.replace("RAISE", str(fields.raised)).replace("TOP", str(fields.top))
    machine_code = compile_assembly(assembly, "count", _COUNT)

    def count(words: NDArray[np.uint64]) -> int:
        if words.dtype != np.uint64 or not words.flags.c_contiguous:
            raise ValueError("needs contiguous 64-bit words")
        blocks = words.size // 8
        rest = count_in_words(words[8 * blocks :], group, kept)
        return rest + (machine_code(_address(words), blocks) if blocks else 0)

    return count


def _address(array: NDArray[Any]) -> int:
    return array.__array_interface__["data"][0]


def compile_assembly(assembly: str, name: str, signature: Any) -> Any:
    """A function of a module as machine code for this CPU."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    try:
        features = binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot read this CPU's features: code for its name alone is right
        features = ""
    triple = binding.get_process_triple()
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=features,
        opt=3,
        reloc="static" if triple.startswith("x86") else "default",
        codemodel="jitdefault",  # code that may lie anywhere in memory
        jit=True,
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(assembly), machine)
    engine.finalize_object()
    function = signature(engine.get_function_address(name))
    function.engine = engine  # owns the memory of the machine code
    return function
