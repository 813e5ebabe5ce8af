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
    by_shard: dict[Path, list[str]] = {}
    for name in names:
        by_shard.setdefault(source.info(name)[0].path, []).append(name)
    count = 0
    with safe_open(str(written), "pt") as ours:
        for path, stored in by_shard.items():
            with safe_open(str(path), "pt") as theirs:
                for name in stored:
                    if source.info(name)[1].dtype in NOT_IN_TORCH:
                        same = filecmp.cmp(path, written, shallow=False)
                        where = "its file"
                    else:
                        same, where = _same(expected(name, theirs.get_tensor(name)), ours.get_tensor(name))
                    if not same:
                        raise FormatError(
                            f"{written}: {name}: {where} differs from {path} after it was written"
                        )
                    count += 1
    return count


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
