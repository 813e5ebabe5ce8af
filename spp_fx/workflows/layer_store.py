"""Pruned layers on their way to a model folder: what is done stays done when the process is killed."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spp_fx.checkpoint import Shard, Workspace, dtype_name, write_safetensors
from spp_fx.pruning.recipe import MatrixReport
from spp_fx.pruning.states import FileStates


class LayerStore:
    """A file of tensors for each finished layer, and the states of the next, in a workspace's store.

    Attributes:
        states: where values wait between layers.
        done: how many layers are finished; those before the first unfinished one.
    """

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self.states = FileStates(work.store)
        self.done = 0
        while work.kept(_file(self.done)) is not None:
            self.done += 1

    def finish(self, layer: int, tensors: Mapping[str, Tensor], reports: tuple[MatrixReport, ...]) -> None:
        """Keep the new tensors of a layer, by their names in the checkpoint.

        The states of the next are whole by then: where the journal has a layer, work goes on after it.
        """
        target = self._path(layer)
        target.unlink(missing_ok=True)  # of a run that was killed before it was whole
        specs = [(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_safetensors(target, specs, lambda name: tensors[name])
        self._work.keep(target.name, synced=True, reports=[report.to_json() for report in reports])
        self.done = layer + 1
        self.states.forget(layer)

    def tensors(self) -> dict[str, Shard]:
        """Where each new tensor lies."""
        shards = [Shard.open(self._path(layer)) for layer in range(self.done)]
        return {name: shard for shard in shards for name in shard.header.tensors}

    def reports(self) -> list[MatrixReport]:
        """Of all finished layers."""
        facts = [self._work.kept(_file(layer)) or {} for layer in range(self.done)]
        return [MatrixReport.from_json(each) for layer in facts for each in layer["reports"]]

    def _path(self, layer: int) -> Path:
        return self._work.store / _file(layer)


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"
