"""Weight files, model folders and locks made byte by byte, without the code under test where it reads them."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spp_fx.sparsity.lock import Lock, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of an element."""

LARGEST = {
    "F64": 0x7FEFFFFFFFFFFFFF, "F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F, "F8_E4M3": 0x7E, "F8_E5M2": 0x7B,
}  # fmt: skip
"""Bits of the largest finite number: all smaller ones but 0 are finite and no zero, subnormals first."""


@dataclass(frozen=True)
class Raw:
    """A matrix by the bits of its elements: unsigned integers of the dtype's width."""

    dtype: str
    bits: NDArray[np.unsignedinteger]

    @property
    def magnitude(self) -> NDArray[np.unsignedinteger]:
        """The bits without the sign."""
        sign = self.bits.dtype.type(1 << (8 * self.bits.itemsize - 1))
        return self.bits & ~sign

    @property
    def mask(self) -> NDArray[np.bool_]:
        return self.magnitude != 0


def save(path: Path, tensors: Mapping[str, Raw]) -> None:
    """Write a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, raw in tensors.items():
        size = raw.bits.nbytes
        header[name] = {"dtype": raw.dtype, "shape": list(raw.bits.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(raw.bits.tobytes() for raw in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def save_model(folder: Path, shards: Sequence[Mapping[str, Raw]]) -> None:
    """Write a model folder: one weight file, or several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if len(shards) == 1:
        save(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lock_of(tensors: Mapping[str, Raw], pattern: Pattern | None = None) -> Lock:
    """The lock of some matrices, from masks that numpy finds."""
    return Lock.of(
        make_entry(name, "linear", PackedMask.from_bool(raw.mask), pattern) for name, raw in tensors.items()
    )


def sparse(rows: int, columns: int, dtype: str = "F32", seed: int = 0) -> Raw:
    """A random matrix that holds 2:4 exactly; columns a multiple of 4."""
    generator = np.random.default_rng(seed)
    unsigned = np.dtype(f"<u{WIDTHS[dtype]}")
    bits = generator.integers(1, LARGEST[dtype], (rows, columns), dtype=np.uint64, endpoint=True)
    order = generator.random((rows, columns // 4, 4)).argsort(axis=2).reshape(rows, columns)
    return Raw(dtype, np.where(order < 2, bits, 0).astype(unsigned))
