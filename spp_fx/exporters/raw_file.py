"""safetensors files as bytes: spans read by several threads in order, headers laid out, files written."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spp_fx.errors import FormatError
from spp_fx.storage.safetensors import LAYOUT_RANK, MAX_HEADER_BYTES

Bytes = NDArray[np.uint8]

SPAN = 2 << 20
"""Bytes of a tensor that one task works on: large against handing it to a thread, small against a cache."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor to be written: `blocks` makes its bytes, span by span, once its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterable[Bytes]]


def read_span(path: Path, start: int, count: int) -> Bytes:
    """`count` bytes of a file from byte `start`.

    Raises:
        FormatError: the file ends before.
    """
    data = np.empty(count, dtype=np.uint8)
    view, done = data.data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                raise FormatError(f"{path}: ends at byte {start + done}, inside a tensor; get it again")
            done += got
    return data


def spans(count: int, step: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive spans of at most `step` that cover `count`."""
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def copy_spans(path: Path, start: int, count: int) -> Iterator[Bytes]:
    """Bytes of a file, span by span."""
    return (read_span(path, start + begin, end - begin) for begin, end in spans(count, SPAN))


def layout(tensors: Iterable[RawTensor]) -> list[RawTensor]:
    """The order of the reference implementation: widest dtype first, then by name."""
    return sorted(tensors, key=lambda tensor: (-LAYOUT_RANK[tensor.dtype], tensor.name))


def header_bytes(tensors: Iterable[RawTensor], metadata: Mapping[str, str], path: Path) -> bytes:
    """The header of a file that holds these tensors in this order.

    Raises:
        FormatError: it is longer than the format allows.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: its header takes {len(text)} bytes, the limit is {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def write_raw(target: Path, header: bytes, blocks: Iterable[Bytes]) -> None:
    """Write a new file, its folders too: a header and the bytes after it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        out.write(header)
        for block in blocks:
            out.write(block.data)
