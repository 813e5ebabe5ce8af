"""Comparing what was written with the model, both read by the safetensors library and not by spp-fx."""

import filecmp
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from spp_fx.checkpoint import ModelFolder
from spp_fx.errors import FormatError

NOT_IN_TORCH = ("F6_E2M3", "F6_E3M2")
"""dtypes whose tensors the library cannot hand out; their files are compared as wholes."""


def check_copied(
    source: ModelFolder,
    names: Iterable[str],
    written: Path,
    expected: Callable[[str, Tensor], Tensor] = lambda _, value: value,
) -> int:
    """Hold copied tensors of a written file to the model's, byte for byte; returns how many were compared.

    Args:
        source: the model.
        names: tensors that were copied; all of one shard if `written` is its copy.
        written: a safetensors file that holds them.
        expected: what becomes of a tensor on the way, given its name and the model's value.

    Raises:
        FormatError: a tensor differs; names the first byte.
    """
    count = 0
    for name in names:
        shard, info = source.info(name)
        if info.dtype in NOT_IN_TORCH:
            same, where = filecmp.cmp(shard.path, written, shallow=False), "its file"
        else:
            same, where = _same(
                expected(name, library_tensor(shard.path, name)), library_tensor(written, name)
            )
        if not same:
            raise FormatError(f"{written}: {name}: {where} differs from {shard.path} after it was written")
        count += 1
    return count


def library_tensor(path: Path, name: str) -> Tensor:
    """A tensor as the safetensors library gives it.

    The library maps a file as long as it is open, and what was looked at counts as memory: it is opened for each.
    """
    with safe_open(str(path), "pt") as file:
        return file.get_tensor(name)


def _same(first: Tensor, second: Tensor) -> tuple[bool, str]:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False, f"{second.dtype} {list(second.shape)}"
    theirs, ours = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    if torch.equal(theirs, ours):
        return True, ""
    return False, f"byte {int((theirs != ours).to(torch.uint8).argmax())}"


def lost_signs(found: Tensor, expected: Tensor) -> int | None:
    """How many zeros differ in sign alone; None where any other element differs in any bit, or the form does."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return None
    if torch.equal(_bits(found), _bits(expected)):
        return 0
    differing = _bits(found) != _bits(expected)
    if bool((differing & ~((found == 0) & (expected == 0))).any()):
        return None
    return int(differing.sum())


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers of their width."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
