"""One pass over a weight: its mask, counts, digest and non-finite values, for every element type.

An element x of `itemsize` bytes, taken as an unsigned integer, is non-zero iff `x & magnitude != 0` and
non-finite iff `(x & magnitude) - non_finite_from`, wrapped, is below `non_finite_span`. No
floating-point unit is involved, so denormals-are-zero modes cannot change the answer.

The data is cut into regions that threads read and pack in pieces that fit the cache, while the caller's
thread hashes the finished regions in order; where it is alone, digests are left to whoever asks for them.
Memory is bounded by the mask (1/16 of bf16 data; twice that for a transposed weight) and one buffer a thread.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError
from spp_fx.parallel import thread_count
from spp_fx.sparsity._backend import Bytes, backend
from spp_fx.sparsity.mask import PackedMask, digest_state

if TYPE_CHECKING:
    import torch

    from spp_fx.storage.safetensors import Shard


@dataclass(frozen=True)
class ElementType:
    """The bits of one element type; `name` is its spelling in a safetensors header."""

    name: str
    itemsize: int
    magnitude: int
    non_finite_from: int
    non_finite_span: int


def _ieee(name: str, itemsize: int, exponent_bits: int) -> ElementType:
    magnitude = (1 << (8 * itemsize - 1)) - 1
    mantissa_bits = 8 * itemsize - 1 - exponent_bits
    first = ((1 << exponent_bits) - 1) << mantissa_bits
    return ElementType(name, itemsize, magnitude, first, magnitude - first + 1)


def _integer(name: str, itemsize: int) -> ElementType:
    return ElementType(name, itemsize, (1 << 8 * itemsize) - 1, 0, 0)


# F8_E4M3 (the "fn" flavour) has no infinities and one NaN a sign; the "fnuz" types have no negative
# zero: 0x80 is their only NaN. F8_E8M0 is absent on purpose: it is an exponent and has no zero.
_TYPES = {
    kind.name: kind
    for kind in (
        _ieee("F64", 8, 11),
        _ieee("F32", 4, 8),
        _ieee("F16", 2, 5),
        _ieee("BF16", 2, 8),
        _ieee("F8_E5M2", 1, 5),
        ElementType("F8_E4M3", 1, 0x7F, 0x7F, 1),
        ElementType("F8_E5M2FNUZ", 1, 0xFF, 0x80, 1),
        ElementType("F8_E4M3FNUZ", 1, 0xFF, 0x80, 1),
        *(_integer(f"{sign}{8 * size}", size) for sign in "IU" for size in (1, 2, 4, 8)),
        _integer("BOOL", 1),
    )
}

_TORCH_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.uint8": "U8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.bool": "BOOL",
}


def element_type(dtype: "str | torch.dtype") -> ElementType:
    """The element type of a safetensors dtype name ('BF16') or a torch dtype.

    Raises:
        FormatError: a type whose zeros cannot be read from whole elements (packed 4-bit, complex, ...).
    """
    name = dtype if isinstance(dtype, str) else _TORCH_NAMES.get(str(dtype), "")
    if name not in _TYPES:
        raise FormatError(f"zeros cannot be counted in dtype {dtype}; supported: {', '.join(_TYPES)}")
    return _TYPES[name]


_PIECE = 1 << 20  # bytes of weight read at once: with its mask it stays in a core's own cache
_REGION = 16 * _PIECE  # bytes of weight a task: large against the cost of handing it to a thread


@dataclass(frozen=True)
class Scan:
    """What one pass over a weight finds.

    Attributes:
        mask: its mask in (out, in) order, count and digest included.
        non_finite: how many elements are infinite or NaN (0 for integers).
        first_non_finite: index of the first of them in storage order, as (out, in) or (expert, out, in).
    """

    mask: PackedMask
    non_finite: int
    first_non_finite: tuple[int, ...] | None


_Found = tuple[int, int, int]
"""Non-zeros, non-finite elements, and the index of the first of those or -1."""


class _Source(Protocol):
    """Where a weight's elements lie; used by one thread at a time."""

    def scan(self, kind: ElementType, start: int, stop: int, out: Bytes) -> _Found:
        """Look at elements start..stop: their mask bits into `out`, and the first index counted from start."""
        ...

    def close(self) -> None: ...


class _Memory:
    def __init__(self, data: Bytes) -> None:
        self._data = data

    def scan(self, kind: ElementType, start: int, stop: int, out: Bytes) -> _Found:
        return _scan_pieces(lambda at, size: self._data[at : at + size], kind, start, stop, out)

    def close(self) -> None:
        """Nothing is held open."""


class _File:
    """Reads rather than maps: a file cut short under a map kills the process, under a read it is an error."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._offset = offset
        self._file = path.open("rb", buffering=0)
        self._buffer = np.empty(_PIECE, dtype=np.uint8)

    def scan(self, kind: ElementType, start: int, stop: int, out: Bytes) -> _Found:
        found, done = (0, 0, -1), 0
        if (scan_descriptor := backend().scan_descriptor) is not None:
            words, *counts = scan_descriptor(
                self._file.fileno(), self._offset + start * kind.itemsize, kind.itemsize, (stop - start) // 64,
                kind.magnitude, kind.non_finite_from, kind.non_finite_span, self._buffer, out,
            )  # fmt: skip
            found, done = (counts[0], counts[1], counts[2]), 64 * words
        # The last elements, and what the kernel could not read: what is wrong is an error here.
        rest = _scan_pieces(self._read, kind, start + done, stop, out[done // 8 :])
        return _join(found, rest, done)

    def _read(self, start: int, count: int) -> Bytes:
        self._file.seek(self._offset + start)
        piece = self._buffer[:count]
        view = piece.data
        filled = 0
        while filled < count:
            got = self._file.readinto(view[filled:])
            if not got:
                end = self._offset + start + filled
                raise FormatError(f"{self._path}: the file ends at byte {end}, inside a tensor")
            filled += got
        return piece

    def close(self) -> None:
        self._file.close()


def _scan_pieces(
    read: Callable[[int, int], Bytes], kind: ElementType, start: int, stop: int, out: Bytes
) -> _Found:
    """`_Source.scan` of bytes that `read` gives, by position and number, a piece at a time."""
    scan_elements = backend().scan_elements
    unsigned = np.dtype(f"<u{kind.itemsize}")
    step = _PIECE // kind.itemsize
    found = (0, 0, -1)
    for at in range(start, stop, step):
        elements = read(at * kind.itemsize, min(step, stop - at) * kind.itemsize).view(unsigned)
        piece = scan_elements(
            elements, kind.magnitude, kind.non_finite_from, kind.non_finite_span, out[(at - start) // 8 :]
        )
        found = _join(found, piece, at - start)
    return found


def _join(before: _Found, after: _Found, offset: int) -> _Found:
    """What was found in two stretches, the second of which begins `offset` elements after the first."""
    first = before[2] if before[2] >= 0 or after[2] < 0 else offset + after[2]
    return before[0] + after[0], before[1] + after[1], first


def load_scanner() -> None:
    """Load the kernels now, so that threads that scan do not all begin to."""
    backend()


def scan_file(
    path: str | os.PathLike[str],
    offset: int,
    shape: tuple[int, ...],
    dtype: "str | torch.dtype",
    *,
    transposed: bool = False,
    threads: int | None = None,
) -> Scan:
    """Scan a tensor that lies contiguous and little-endian in a file, such as a safetensors shard.

    Args:
        path: the file.
        offset: absolute position of the tensor's first byte.
        shape: the STORED shape, 2-D or 3-D.
        dtype: a safetensors dtype name ('BF16', 'F8_E4M3', ...) or a torch dtype.
        transposed: the last two dimensions are stored (in, out), as in Conv1D.
        threads: threads to read with; by default the CPUs at hand, at most 8.

    Raises:
        FormatError: the file ends early, the dtype has no zeros to look for, or the shape is not 2-D or 3-D.
        OSError: the file cannot be read.
    """
    kind = element_type(dtype)
    _check_shape(shape, str(path))
    with ExitStack() as open_files:

        def open_source() -> _Source:
            return open_files.enter_context(closing(_File(Path(path), offset)))

        return _scan(open_source, kind, shape, transposed, threads)


def scan_stored(shard: "Shard", name: str, *, transposed: bool = False) -> Scan:
    """Scan a tensor of a safetensors file; see `scan_file`."""
    info = shard.info(name)
    return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)


def scan_tensor(tensor: "torch.Tensor", *, transposed: bool = False, threads: int | None = None) -> Scan:
    """Scan a tensor in memory; one that is not on the CPU or not contiguous is copied first.

    Args:
        tensor: (out, in) or (experts, out, in); with `transposed`, the last two are (in, out).
        transposed: as for `scan_file`.
        threads: as for `scan_file`.

    Raises:
        FormatError: a dtype without zeros to look for, a shape that is not 2-D or 3-D, a sparse layout or
            a tensor without data.
    """
    import torch

    kind = element_type(tensor.dtype)
    shape = tuple(tensor.shape)
    _check_shape(shape, "tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise FormatError(f"a {tensor.layout} tensor on {tensor.device} has no dense data to look at")
    stored = tensor.detach().resolve_neg().cpu().contiguous()
    data: NDArray[np.uint8] = stored.reshape(-1).view(torch.uint8).numpy()
    return _scan(lambda: _Memory(data), kind, shape, transposed, threads)


def pack_mask(tensor: "torch.Tensor", transposed: bool = False) -> PackedMask:
    """The mask of a tensor: value != 0, so -0.0 is zero, NaN and subnormals are not; see `scan_tensor`."""
    return scan_tensor(tensor, transposed=transposed).mask


def count_non_finite(tensor: "torch.Tensor") -> int:
    """Infinite and NaN elements of a 2-D or 3-D tensor; see `scan_tensor`."""
    return scan_tensor(tensor).non_finite


def first_non_finite(tensor: "torch.Tensor") -> tuple[int, ...] | None:
    """Index of the first infinite or NaN element of a 2-D or 3-D tensor; see `scan_tensor`."""
    return scan_tensor(tensor).first_non_finite


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if len(shape) not in (2, 3) or min(shape) < 0:
        raise FormatError(f"{where}: a weight has 2 dimensions, or 3 for an expert stack, not shape {shape}")


def _scan(
    open_source: Callable[[], _Source],
    kind: ElementType,
    shape: tuple[int, ...],
    transposed: bool,
    threads: int | None,
) -> Scan:
    canonical = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    bits = np.empty((math.prod(shape) + 7) // 8, dtype=np.uint8)
    # Where other threads read, this one hashes meanwhile; one that is alone leaves it to `digest_masks`.
    state = digest_state(canonical) if (threads or thread_count()) > 1 else None
    nnz, non_finite, first = 0, 0, -1
    for done in _scan_regions(open_source, kind, math.prod(shape), bits, threads):
        nnz += done.nnz
        if first < 0 and done.first_non_finite >= 0:
            first = done.first_non_finite
        non_finite += done.non_finite
        if state is not None and not transposed:
            state.update(done.bits.data)
    if transposed:
        bits = _transpose(bits, shape)
        if state is not None:
            state.update(bits.data)
    mask = PackedMask.measured(canonical, bits, nnz, None if state is None else state.hexdigest())
    return Scan(mask, non_finite, None if first < 0 else _index(first, shape, transposed))


@dataclass(frozen=True)
class _Region:
    bits: Bytes
    nnz: int
    non_finite: int
    first_non_finite: int


def _scan_regions(
    open_source: Callable[[], _Source], kind: ElementType, numel: int, bits: Bytes, threads: int | None
) -> Iterator[_Region]:
    """Fill `bits` and yield the finished regions in order."""
    step = _REGION // kind.itemsize
    starts = range(0, numel, step)
    workers = min(threads or thread_count(), len(starts))
    sources: SimpleQueue[_Source] = SimpleQueue()
    for _ in range(workers):
        sources.put(open_source())

    def scan(start: int) -> _Region:
        source, stop = sources.get(), min(start + step, numel)
        region = bits[start // 8 : (stop + 7) // 8]
        try:
            nnz, non_finite, first = source.scan(kind, start, stop, region)
        finally:
            sources.put(source)
        return _Region(region, nnz, non_finite, start + first if first >= 0 else -1)

    if workers <= 1:
        yield from map(scan, starts)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="sparsity-scan") as pool:
        yield from pool.map(scan, starts)


def _transpose(bits: Bytes, shape: tuple[int, ...]) -> Bytes:
    *experts, rows, columns = shape
    target = np.zeros_like(bits)
    for expert in range(math.prod(experts)):
        backend().transpose_bits(bits, target, expert * rows * columns, rows, columns)
    return target


def _index(linear: int, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    *outer, row, column = (int(i) for i in np.unravel_index(linear, shape))
    return (*outer, column, row) if transposed else (*outer, row, column)


def _nothing() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Weights:
    """The weights of something written, looked at one by one.

    Attributes:
        names: its weights.
        scan: look at a weight, given its name and whether its site is stored (in, out).
        file: the name of the file that holds a weight.
        sites: the weights that must be sparse where no lock says so: name -> stored (in, out)? One that is
            not there is among them, under the name that it should have.
        refused: sites whose weights cannot be looked at although something is stored for them, and why.
        left_out: matrices that are not sites because of what the model does with them (embeddings, the head,
            routers), each with that reason.
        unread: whatever else holds weights, is not among the sites and is not looked at, each with the reason.
        guessed: whether `sites` goes by names alone, so that how they are stored is not known.
        shape: of a weight, without a look at it; None where that is not known, and every weight is a matrix.
    """

    names: frozenset[str]
    scan: Callable[[str, bool], Scan]
    file: Callable[[str], str]
    sites: Callable[[], Mapping[str, bool]]
    refused: Callable[[], Mapping[str, str]] = _nothing
    left_out: Callable[[], Mapping[str, str]] = _nothing
    unread: Callable[[], Mapping[str, str]] = _nothing
    guessed: bool = False
    shape: Callable[[str], tuple[int, ...]] | None = None


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor is at least a matrix, and not a vector with dimensions of 1 around it."""
    return sum(size > 1 for size in shape) > 1
