"""What an export format is: a name, a writer, and a reader of what was written.

How far a reader is independent of its writer:

- safetensors: every tensor is compared with the model's byte for byte, both read by the safetensors library.
- cusparselt, cutlass: packs are decoded through tables of offsets (`cusparselt_reader`, `cutlass_reader`), which
  the writers never compute, and held to the model's weights; tensors that are no sites are compared as in
  safetensors. Where `--dtype` rounds, the rounded values are computed once more by the same function.
- sparse-bitmask: files are read by the safetensors library and decoded by numpy alone.
- onnx, onnx-packed, onnx-dense: weights are read by a parser of their own (`onnx.reader`, `onnx.unpack`) and
  held to the model's, bit for bit; small graphs are run and their logits compared.

The fast look at zeros (`spp_fx.sparsity`) and the safetensors header reader serve both sides everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spp_fx.exporters.manifest import Manifest
from spp_fx.exporters.source import Source
from spp_fx.progress import Tick
from spp_fx.registry import Registry
from spp_fx.sparsity import Weights

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportSettings:
    """Options of the formats; each format names those it takes.

    Attributes:
        sm: GPU generation that weights are packed for, such as 80 or 90.
        dtype: float32, float16 or bfloat16 to round the weights to; None keeps theirs.
        indices: index type of sparse initializers.
        with_past: an ONNX graph with a key/value cache as inputs and outputs.
        compare_logits: whether the written graph is run and its logits compared with the model's; None where
            the model is small enough.
    """

    sm: int = 80
    dtype: str | None = None
    indices: Literal["smallest", "int64"] = "smallest"
    with_past: bool = False
    compare_logits: bool | None = None


@dataclass(frozen=True)
class Decoded:
    """The model's tensors as an export gives them back, one by one.

    Attributes:
        shapes: as the model's files store them, by the names of those files.
        read: a tensor by name, as the model stores it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: as `--format` and the manifest spell it.
        write: writes all files, lock and manifest of an export into an empty folder and compares what it
            can; returns what it checked. Called with source, folder, settings, tick, say.
        read: the weights of such a folder, from its files.
        options: the fields of `ExportSettings` that it takes.
        decode: gives the model's tensors back; None where the export is a program of its own.
        mends_config: takes a model of plain weights whose config.json has a sparsity_config, and writes it
            without.
        restore: writes the files of the model's folder that hold weights, byte for byte as they were; None
            where the export does not know them. Called with export, manifest, target, tick.
    """

    name: str
    write: Callable[[Source, Path, ExportSettings, Tick, Say], dict[str, Any]]
    read: Callable[[Path, Manifest], Weights]
    options: frozenset[str] = frozenset()
    decode: Callable[[Path, Manifest], Decoded] | None = None
    restore: Callable[[Path, Manifest, Path, Tick], None] | None = None
    mends_config: bool = False


FORMATS = Registry[Format]("export format", "spp_fx.formats")


def register(format: Format) -> Format:
    """Make a format known; packages of others use the entry point group `spp_fx.formats`."""
    FORMATS[format.name] = format
    return format


def find_format(name: str) -> Format:
    """A format by name; UsageError lists what is known."""
    return FORMATS.find(name)
