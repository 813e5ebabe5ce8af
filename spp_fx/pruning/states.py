"""Where the values that a layer reads of each sample wait between two layers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spp_fx.errors import PreconditionError


class States(Protocol):
    """The values that each layer reads of each sample; at most two layers' are kept at a time."""

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        """Keep what a layer will read; samples come in order."""
        ...

    def load(self, layer: int, sample: int) -> list[Any]:
        """What a layer reads, in memory of its own."""
        ...

    def finish(self, layer: int) -> None:
        """All samples of this layer were saved, and nothing before it is read any more."""
        ...


class MemoryStates:
    """States in memory."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], list[Any]] = {}

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        self._values[layer, sample] = [_copy(value) for value in values]

    def load(self, layer: int, sample: int) -> list[Any]:
        return [_copy(value) for value in self._values[layer, sample]]

    def finish(self, layer: int) -> None:
        for key in [key for key in self._values if key[0] < layer]:
            del self._values[key]


class FileStates:
    """States in a file for each layer, which a process that was killed leaves behind whole.

    A file holds the tensors of sample after sample; what is no tensor (a size) is the same for each and
    lies in a small file beside it, with the shapes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forms: dict[int, list[dict[str, Any]]] = {}

    def save(self, layer: int, sample: int, values: Sequence[Any]) -> None:
        form = [_form(value) for value in values]
        if sample == 0:
            self._forms[layer] = form
            self._form_file(layer).write_text(json.dumps(form))
        elif form != self._forms[layer]:
            raise PreconditionError(
                "a layer reads values of other shapes in other samples of the same length"
            )
        with open(self._file(layer), "wb" if sample == 0 else "r+b") as file:
            file.seek(sample * _nbytes(form))
            for value in values:
                if isinstance(value, Tensor):
                    file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def load(self, layer: int, sample: int) -> list[Any]:
        if layer not in self._forms:
            self._forms[layer] = json.loads(self._form_file(layer).read_text())
        form = self._forms[layer]
        with open(self._file(layer), "rb") as file:
            file.seek(sample * _nbytes(form))
            return [_read(file, each) for each in form]

    def finish(self, layer: int) -> None:
        for path in (self._file(layer), self._form_file(layer)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def forget(self, layer: int) -> None:
        """Remove what a layer read."""
        self._file(layer).unlink(missing_ok=True)
        self._form_file(layer).unlink(missing_ok=True)

    def _file(self, layer: int) -> Path:
        return self._folder / f"states-{layer:05d}.bin"

    def _form_file(self, layer: int) -> Path:
        return self._folder / f"states-{layer:05d}.json"


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _form(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, bool | int | float) or value is None:
        return {"value": value}
    raise PreconditionError(f"a layer reads a {type(value).__name__}, which cannot be kept between layers")


def _nbytes(form: Sequence[dict[str, Any]]) -> int:
    return sum(
        torch.Size(each["shape"]).numel() * getattr(torch, each["dtype"]).itemsize
        for each in form
        if "dtype" in each
    )


def _read(file: Any, form: dict[str, Any]) -> Any:
    if "dtype" not in form:
        return form["value"]
    dtype = getattr(torch, form["dtype"])
    data = torch.empty(torch.Size(form["shape"]).numel() * dtype.itemsize, dtype=torch.uint8)
    if file.readinto(data.numpy().data) != data.numel():
        raise PreconditionError(f"{file.name}: ended early; it is removed: give the same command again")
    return data.view(dtype).view(form["shape"])
