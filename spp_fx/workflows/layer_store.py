"""Pruned layers on their way to a model folder: what is done stays done when the process is killed."""

import fcntl
import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from spp_fx.checkpoint import Shard, dtype_name, write_safetensors
from spp_fx.errors import UsageError
from spp_fx.pruning.recipe import MatrixReport
from spp_fx.pruning.states import FileStates

PLAN = "plan.json"


class LayerStore:
    """A folder with one file of tensors and one report for each finished layer, and the states of the next.

    Attributes:
        done: how many layers are finished; those before the first unfinished one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = FileStates(folder)
        self.done = 0
        while self._report(self.done).is_file():
            self.done += 1

    def finish(self, layer: int, tensors: Mapping[str, Tensor], reports: tuple[MatrixReport, ...]) -> None:
        """Keep the new tensors of a layer, by their names in the checkpoint.

        The report comes last: where it is, the layer is finished, and the states of the next are whole.
        """
        target, temporary = self._tensors(layer), self.folder / "layer.tmp"
        temporary.unlink(missing_ok=True)
        specs = [(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_safetensors(temporary, specs, lambda name: tensors[name])
        os.replace(temporary, target)
        _write(self._report(layer), [report.to_json() for report in reports])
        self.done = layer + 1
        self.states.forget(layer)

    def tensors(self) -> dict[str, Shard]:
        """Where each new tensor lies."""
        shards = [Shard.open(self._tensors(layer)) for layer in range(self.done)]
        return {name: shard for shard in shards for name in shard.header.tensors}

    def reports(self) -> list[MatrixReport]:
        """Of all finished layers."""
        return [
            MatrixReport.from_json(each)
            for layer in range(self.done)
            for each in json.loads(self._report(layer).read_text())
        ]

    def _tensors(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _report(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.json"


@contextmanager
def layer_store(
    out: Path, plan: dict[str, Any], say: Callable[[str], None]
) -> Generator[LayerStore, None, None]:
    """The store of the work on `out`, which goes on where an earlier run with the same plan was stopped.

    It lies beside `out` as `.NAME.prune` and is removed when the block ends well.

    Args:
        out: the folder that the work will end in.
        plan: everything that the result depends on, as JSON.
        say: told where the work begins, and what is kept if it fails.

    Raises:
        UsageError: another process works on the same output.
    """
    folder = out.parent / f".{out.name}.prune"
    lock = _locked(out, folder)
    try:
        known = _read(folder / PLAN)
        if known != plan:
            if known is not None:
                odd = [key for key in plan if known.get(key) != plan[key]]
                say(f"{folder}: holds the work of another command ({', '.join(odd)}); starting over")
            _clear(folder)
            _write(folder / PLAN, plan)
        store = LayerStore(folder)
        if store.done:
            say(f"{folder}: {store.done} layers are done, going on")
        try:
            yield store
        except BaseException:
            if store.done:
                say(f"{folder}: keeps {store.done} layers; the same command goes on there, or remove it")
            else:
                _clear(folder)
                folder.rmdir()
            raise
        _clear(folder)
        folder.rmdir()
    finally:
        os.close(lock)


def _locked(out: Path, folder: Path) -> int:
    """A descriptor of the folder that nobody else holds; the folder is there while it is open."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.fstat(lock).st_ino == folder.stat().st_ino:
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(
                f"{out}: another process is pruning into it; wait for it, or give another -o"
            ) from error
        os.close(lock)  # somebody finished and removed it between two of these lines


def _clear(folder: Path) -> None:
    """Remove what is in a store, first of all what says that it is one."""
    (folder / PLAN).unlink(missing_ok=True)
    _sync(folder)
    for path in folder.iterdir():
        path.unlink()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: Any) -> None:
    """Whole or not at all, and on the disk."""
    temporary = path.with_name("json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
