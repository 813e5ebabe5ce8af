"""One large safetensors file in a workspace: written tensor by tensor, taken up again where it was durable."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from spp_fx.checkpoint.disk import check_space
from spp_fx.checkpoint.header import stored_nbytes
from spp_fx.checkpoint.stream import Content, TensorSpec, header_bytes, layout, write_all, write_content
from spp_fx.checkpoint.strict_json import shown
from spp_fx.checkpoint.workspace import Workspace

PART_BYTES = 256 * 2**20
"""Bytes after which what is written is made durable: a second or two of work is the most that is lost."""


@dataclass(frozen=True)
class Memory:
    """What a writer knows that its file does not say.

    Attributes:
        facts: makes durable what it depends on, and gives it as JSON.
        recall: called with the names of the tensors that are written, in order, and the facts of that
            moment; says whether it can go on from there.
    """

    facts: Callable[[], dict[str, Any]]
    recall: Callable[[list[str], dict[str, Any]], bool]


def write_in_parts(
    work: Workspace,
    name: str,
    specs: Iterable[TensorSpec],
    produce: Callable[[str], Content],
    metadata: Mapping[str, str],
    memory: Memory,
) -> dict[str, Any]:
    """As `write_safetensors`, but a run that was killed goes on after the tensors that were durable.

    Args:
        work: where the file is written.
        name: its path in `work.folder`.
        specs, produce, metadata: as for `write_safetensors`; `produce` is called for what is not there yet.
        memory: of the caller.

    Returns:
        The facts of the finished file.

    Raises:
        FormatError: as `write_safetensors`.
        SppFxError: the disk has no room for the whole file; says both numbers.
        OSError: the disk is full or refuses to be written.
    """
    if (facts := work.finished(name)) is not None:
        return facts
    path = work.folder / name
    ordered = layout(specs, path)
    raw = header_bytes(ordered, metadata, path)
    sizes = (stored_nbytes(dtype, shape, shown(tensor)) for tensor, dtype, shape in ordered)
    ends = list(accumulate(sizes, initial=len(raw)))
    done = _written(work, name, raw, ends, [tensor for tensor, _, _ in ordered], memory)
    if done == 0:
        path.unlink(missing_ok=True)
    start = ends[done] if done else 0
    check_space(path, path.parent, ends[-1] - start)
    with open(path, "r+b" if done else "xb", buffering=0) as out:
        if not done:
            write_all(out, memoryview(raw))
        out.seek(ends[done])
        for (tensor, dtype, shape), end in zip(ordered[done:], ends[done + 1 :], strict=True):
            write_content(out, produce(tensor), dtype, shape, f"{path}: tensor {shown(tensor)}")
            if end - start >= PART_BYTES and end < ends[-1]:
                os.fsync(out.fileno())
                work.keep_part(name, end, **memory.facts())
                start = end
        os.fsync(out.fileno())
    work.finish(name, synced=True, **memory.facts())
    return work.finished(name) or {}


def _written(
    work: Workspace, name: str, raw: bytes, ends: list[int], tensors: list[str], memory: Memory
) -> int:
    """How many tensors an earlier run left whole; 0 where the file is not the one to be written."""
    part = work.part(name)
    if part is None or part[0] not in ends or _first_bytes(work.folder / name, len(raw)) != raw:
        return 0
    done = ends.index(part[0])
    return done if memory.recall(tensors[:done], part[1]) else 0


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)
