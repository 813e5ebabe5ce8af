"""Writing a model folder into a workspace, weight file by weight file: finished ones are not written again."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from spp_fx.checkpoint.folder import ModelFolder
from spp_fx.checkpoint.layout import within
from spp_fx.checkpoint.shard import Shard
from spp_fx.checkpoint.stream import copy_file
from spp_fx.checkpoint.workspace import Workspace


def copy_others(source: ModelFolder, target: Path, skip: Collection[str] = ()) -> None:
    """Copy configuration, tokenizer and the index of the weights.

    Args:
        source: a model folder.
        target: an existing folder that holds none of them.
        skip: relative paths ('README.md') of files that are not copied.
    """
    names = [path.as_posix() for path in source.other_files() if path.as_posix() not in skip]
    for name in [*names, *([source.index] if source.index is not None else [])]:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.path / name, file)


def write_shards(
    source: ModelFolder,
    target: Path,
    write: Callable[[Shard, Path], dict[str, Any]],
    work: Workspace | None = None,
) -> list[dict[str, Any]]:
    """Write a file for each weight file of a model; those that an earlier run finished stay as they are.

    Args:
        source: a folder opened with its weights.
        target: where the files go, under the names of the model's; the folder of `work`, or one in it.
        write: writes the file of a shard to a path that does not exist yet; returns its facts, JSON.
        work: what knows of earlier runs; without one, every file is written.

    Returns:
        The facts of each file, in the order of `source.shards`.
    """
    every: list[dict[str, Any]] = []
    for shard in source.shards:
        file = within(target, shard.name)
        name = "" if work is None else file.relative_to(work.folder).as_posix()
        facts = None if work is None else work.finished(name)
        if facts is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = write(shard, file)
            if work is not None:
                work.finish(name, **facts)
        every.append(facts)
    return every
