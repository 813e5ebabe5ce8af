"""Writing a model folder as a copy of another one in which some tensors are replaced."""

from collections.abc import Callable, Collection
from pathlib import Path

from spp_fx.checkpoint.folder import ModelFolder
from spp_fx.checkpoint.header import TensorInfo
from spp_fx.checkpoint.layout import within
from spp_fx.checkpoint.shard import Shard
from spp_fx.checkpoint.stream import Content, Rewritten, copy_file, rewrite_shard


def rewrite_model(
    source: ModelFolder,
    target: Path,
    replace: "Callable[[Shard, TensorInfo], Content | None]",
    skip: Collection[str] = (),
) -> tuple[Rewritten, ...]:
    """Write `source` again: the same shards, index and other files, some tensors replaced.

    Args:
        source: a folder opened with its weights; it is not modified.
        target: an existing empty folder, as `atomic_folder` yields it.
        replace: called once for each tensor, shard by shard in file order; see `rewrite_shard`.
        skip: relative paths ('README.md') of other files that are not copied.

    Returns:
        What was replaced, for each shard in the order of `source.shards`.

    Raises:
        what `rewrite_shard` and `copy_file` raise.
    """
    names = [path.as_posix() for path in source.other_files() if path.as_posix() not in skip]
    if source.index is not None:
        names.append(source.index)
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.path / name, file)
    written: list[Rewritten] = []
    for shard in source.shards:
        file = within(target, shard.name)
        file.parent.mkdir(parents=True, exist_ok=True)

        def here(info: TensorInfo, shard: Shard = shard) -> "Content | None":
            return replace(shard, info)

        written.append(rewrite_shard(shard, file, here))
    return tuple(written)
