"""One pass over a weight, in a file or in memory: its mask, its counts and its non-finite values.

The data is divided into regions. A thread takes one region at a time, and reads and packs it in chunks that fit a
core's cache. Memory: the mask (1/16 of bf16 data; three times that for a transposed weight) and one chunk a thread.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError
from spp_fx.parallel import in_order, thread_count
from spp_fx.sparsity.kernels import (
    Bytes,
    ElementType,
    element_type,
    first_non_finite,
    scanner,
    transpose_bits,
)
from spp_fx.sparsity.mask import PackedMask
from spp_fx.storage.safetensors import Shard, read_at

if TYPE_CHECKING:
    import torch

_CHUNK = 2 << 20  # bytes of weight read at once: with its mask it stays in the cache, and calls cost little
_REGION = 16 * _CHUNK  # bytes of weight a task: large against the cost of handing it to a thread


@dataclass(frozen=True)
class Scan:
    """What one pass over a weight finds.

    Attributes:
        mask: its mask in (out, in) order, count included.
        non_finite: how many elements are infinite or NaN (0 for integers).
        first_non_finite: index of the first of them in storage order, as (out, in) or (expert, out, in).
    """

    mask: PackedMask
    non_finite: int
    first_non_finite: tuple[int, ...] | None

    @property
    def position(self) -> str | None:
        """`first_non_finite` as messages name it: 'row 5, column 9', of a stack after 'expert 2, '."""
        if self.first_non_finite is None:
            return None
        names = ("row", "column") if len(self.first_non_finite) == 2 else ("expert", "row", "column")
        return ", ".join(f"{name} {index}" for name, index in zip(names, self.first_non_finite, strict=True))


def scan_stored(shard: Shard, name: str, *, transposed: bool = False) -> Scan:
    """Scan a tensor of a safetensors file; raises as `scan_file`, and UsageError if there is no such tensor."""
    info = shard.info(name)
    return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)


def scan_file(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: str,
    *,
    transposed: bool = False,
) -> Scan:
    """Scan a tensor that is stored contiguous and little-endian in a file.

    Args:
        offset: absolute position of the tensor's first byte.
        shape: the STORED shape, 2-D or 3-D.
        dtype: a safetensors dtype name ('BF16', 'F8_E4M3', ...).
        transposed: the last two dimensions are stored (in, out), as in Conv1D.

    Raises:
        FormatError: the file ends early, the dtype has no readable zeros, or the shape is not 2-D or 3-D.
        OSError: the file cannot be read.
    """
    kind = element_type(dtype)
    _check_shape(shape, str(path))
    with open(path, "rb", buffering=0) as file:

        def read(start: int, buffer: Bytes) -> Bytes:
            done = read_at(file.fileno(), offset + start, buffer.data)
            if done < buffer.size:
                raise FormatError(f"{path}: the file ends at byte {offset + start + done}, inside a tensor")
            return buffer

        return _scan(read, kind, shape, transposed)


def scan_tensor(tensor: "torch.Tensor", *, transposed: bool = False) -> Scan:
    """Scan a tensor in memory; one that is not on the CPU or not contiguous is copied first.

    Args:
        tensor: (out, in) or (experts, out, in); with `transposed`, the last two are (in, out).

    Raises:
        FormatError: the dtype has no readable zeros, the shape is not 2-D or 3-D, or the tensor is sparse or on the
            meta device.
    """
    import torch

    kind = element_type(tensor.dtype)
    shape = tuple(tensor.shape)
    _check_shape(shape, "tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise FormatError(f"a {tensor.layout} tensor on {tensor.device} has no dense data to scan")
    stored = tensor.detach().resolve_neg().cpu().contiguous()
    data: NDArray[np.uint8] = stored.reshape(-1).view(torch.uint8).numpy()
    return _scan(lambda start, buffer: data[start : start + buffer.size], kind, shape, transposed)


def pack_mask(tensor: "torch.Tensor", transposed: bool = False) -> PackedMask:
    """The mask of a tensor: value != 0, so -0.0 is zero, NaN and subnormals are not; see `scan_tensor`."""
    return scan_tensor(tensor, transposed=transposed).mask


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if len(shape) not in (2, 3) or min(shape) < 0:
        raise FormatError(f"{where}: a weight has 2 dimensions, or 3 for an expert stack, not shape {shape}")


def _scan(
    read: Callable[[int, Bytes], Bytes],
    kind: ElementType,
    shape: tuple[int, ...],
    transposed: bool,
) -> Scan:
    """Scan the bytes that `read` returns: from a position on, as many as a buffer holds, perhaps in that buffer."""
    numel, size = math.prod(shape), kind.itemsize
    scan, unsigned = scanner(size), np.dtype(f"<u{size}")
    bits = np.empty((numel + 7) // 8, dtype=np.uint8)

    def scan_region(start: int) -> tuple[int, int, int]:
        """Fill the region's bits; its non-zeros, its non-finites and the index of the first of those or -1."""
        stop, step = min(start + _REGION // size, numel), _CHUNK // size
        buffer = np.empty(min(step, stop - start) * size, dtype=np.uint8)
        nnz, non_finite, first = 0, 0, -1
        for at in range(start, stop, step):
            elements = read(at * size, buffer[: (stop - at) * size]).view(unsigned)
            ones, infinite = scan(elements, kind, bits[at // 8 :])
            if infinite and first < 0:
                first = at + first_non_finite(elements, kind)
            nnz, non_finite = nnz + ones, non_finite + infinite
        return nnz, non_finite, first

    regions = range(0, numel, _REGION // size)
    found = list(in_order(scan_region, regions, min(thread_count(), len(regions))))
    first = next((first for _, _, first in found if first >= 0), None)
    canonical = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    mask = PackedMask.counted(
        canonical, transpose_bits(bits, shape) if transposed else bits, sum(nnz for nnz, _, _ in found)
    )
    non_finite = sum(non_finite for _, non_finite, _ in found)
    return Scan(mask, non_finite, None if first is None else _index(first, shape, transposed))


def _index(linear: int, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    *outer, row, column = (int(i) for i in np.unravel_index(linear, shape))
    return (*outer, column, row) if transposed else (*outer, row, column)
