"""Comparing exports with their model; files are read by the safetensors library and not by spp-fx."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spp_fx.errors import FormatError, MaskError
from spp_fx.exporters.format import Decoded, Source
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard

_MAPPED_BYTES = 256 << 20
NOT_IN_TORCH = ("F6_E2M3", "F6_E3M2")
"""dtypes whose tensors the library cannot return; their stored bytes are compared."""


def check_copied(
    source: ModelFolder,
    names: Iterable[str],
    written: Path,
    expected: Callable[[str, Tensor], Tensor] = lambda _, value: value,
) -> int:
    """Compare copied tensors of a written file with the model's, byte for byte; returns how many.

    Args:
        written: a safetensors file that holds the tensors.
        expected: the value that a tensor must have, given its name and the model's value.

    Raises:
        FormatError: a tensor differs; names the first byte.
    """
    count, library = 0, LibraryReader()
    for name in names:
        shard, info = source.info(name)
        if info.dtype in NOT_IN_TORCH:
            fault = "it" if Shard.open(written).difference(shard, name) else None
        else:
            theirs = expected(name, library.read(shard.path, name))
            fault = difference(theirs, library.read(written, name))
        if fault is not None:
            raise FormatError(f"{written}: {name}: {fault} differs from {shard.path} after it was written")
        count += 1
    return count


def check_decoded(source: Source, decoded: Decoded) -> dict[str, int]:
    """Compare every tensor that an export decodes to with the model's, byte for byte; returns how many are equal.

    Raises:
        MaskError: a tensor differs, is missing or is not of the model; names it.
    """
    if stray := decoded.shapes.keys() ^ set(source.folder.names):
        raise MaskError(f"{min(stray)}: is in the export or in the model, not in both")
    for name in source.folder.names:
        fault = difference(source.stored(name), decoded.read(name))
        if fault is not None:
            raise MaskError(f"{name}: decoded from the export, it is not the model's ({fault})")
    return {"tensors_equal": len(source.folder.names)}


class LibraryReader:
    """Tensors as the safetensors library reads them.

    The library parses the whole header when it opens a file, so files stay open. It maps an open file, and what was
    read of it counts as memory: after every `_MAPPED_BYTES` all files are opened again.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._bytes = 0

    def read(self, path: Path, name: str) -> Tensor:
        """A tensor of a file, mapped as long as it lives."""
        tensor = self._open(path).get_tensor(name)
        self._bytes += tensor.nbytes
        return tensor

    def metadata(self, path: Path) -> dict[str, str]:
        """`__metadata__` of a file."""
        return self._open(path).metadata() or {}

    def _open(self, path: Path) -> Any:
        if self._bytes > _MAPPED_BYTES:
            self._files, self._bytes = {}, 0
        if path not in self._files:
            self._files[path] = safe_open(str(path), "pt")
        return self._files[path]


def difference(expected: Tensor, found: Tensor) -> str | None:
    """The first byte in which two tensors differ, in words; None where they are equal."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{found.dtype} {list(found.shape)}"
    theirs, ours = (t.contiguous().reshape(-1).view(torch.uint8) for t in (expected, found))
    if torch.equal(theirs, ours):
        return None
    return f"byte {int((theirs != ours).to(torch.uint8).argmax())}"


def lost_signs(found: Tensor, expected: Tensor) -> int | None:
    """How many zeros differ in sign alone; None where any other element differs in any bit, or dtype or shape do."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return None
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    ours, theirs = (tensor.contiguous().view(integer) for tensor in (found, expected))
    if torch.equal(ours, theirs):
        return 0
    differing = ours != theirs
    if bool((differing & ~((found == 0) & (expected == 0))).any()):
        return None
    return int(differing.sum())
