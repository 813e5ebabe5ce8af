"""The layers of a model folder that a verb changes one after another: kept in a workspace, then written as a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spp_fx.graph.binding import take_apart
from spp_fx.pruning.walk import FileStates
from spp_fx.storage.safetensors import Shard, TensorInfo, dtype_name
from spp_fx.storage.workspace import Workspace
from spp_fx.storage.writer import rewrite_shard, write_safetensors, write_shards
from spp_fx.verification.model_sites import ModelSites


class LayerStore:
    """The finished layers of a run, a file each, and the inputs of the next layer, in the store of a workspace.

    Attributes:
        states: the values that wait between layers.
        done: how many layers are finished, counted from the first.
    """

    def __init__(self, work: Workspace, found: ModelSites) -> None:
        self._work, self._found = work, found
        self.states = FileStates(work.store)
        self.done = 0
        while work.kept(_file(self.done)) is not None:
            self.done += 1

    def more_states(self, name: str) -> FileStates:
        """Values of another kind that wait between layers."""
        folder = self._work.store / name
        folder.mkdir(exist_ok=True)
        return FileStates(folder)

    def finish(self, layer: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the new parameters of a layer, and facts about it, after the inputs of the next layer were kept."""
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for matrix, part in take_apart(self._found.matrices[name], tensor):
                if matrix.offset is None:
                    stored[matrix.tensor] = part
                    continue
                if matrix.tensor not in stored:
                    stored[matrix.tensor] = self._found.folder.read(matrix.tensor)
                stored[matrix.tensor][matrix.held] = part.cpu()
        target = self._work.store / _file(layer)
        target.unlink(missing_ok=True)  # a killed run may have left half of it
        specs = [(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()]
        write_safetensors(target, specs, stored.__getitem__)
        self._work.keep(target.name, **facts)
        self.done = layer + 1
        self.states.forget(layer)

    def facts(self) -> list[dict[str, Any]]:
        """What `finish` was told about each layer."""
        return [self._work.kept(_file(layer)) or {} for layer in range(self.done)]

    def write(self) -> None:
        """Write the model's shards with the new tensors in their places."""
        shards = [Shard.open(self._work.store / _file(layer)) for layer in range(self.done)]
        changed = {name: shard for shard in shards for name in shard.header.tensors}

        def write(shard: Shard, target: Path) -> dict[str, Any]:
            def replace(info: TensorInfo) -> Tensor | None:
                return changed[info.name].read(info.name) if info.name in changed else None

            rewrite_shard(shard, target, replace)
            return {}

        write_shards(self._found.folder, self._work.folder, write, self._work)


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"
