"""The weights of a model folder for a program that holds those of one layer at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.checkpoint import ModelFolder, torch_dtype
from spp_fx.errors import FormatError
from spp_fx.ir.binding import assemble
from spp_fx.ir.program import Program
from spp_fx.pruning.layerwise import Part, replace_tensor
from spp_fx.workflows.survey import Survey


@dataclass(frozen=True)
class FolderWeights:
    """Tensors read from a folder when a layer is about to run, and let go after it."""

    found: Survey

    @property
    def folder(self) -> ModelFolder:
        return self.found.folder

    def fill(self, program: Program, names: Iterable[str], device: torch.device) -> None:
        """Read parameters and stored buffers; each in the dtype that the program computes in.

        Raises:
            FormatError: the folder holds nothing for a parameter.
        """
        for name in names:
            current = _current(program, name)
            source = self._source(program, name)
            if source is None and current.device.type == "meta":
                raise FormatError(
                    f"{self.folder.path}: {name}: "
                    f"{self.found.binding.refused.get(name, 'the checkpoint holds no tensor for it')}"
                )
            tensor = current if source is None else self._read(source, current)
            if current.is_floating_point() and (not tensor.is_floating_point() or tensor.itemsize < 2):
                raise FormatError(
                    f"{self.folder.path}: {name} is stored as {tensor.dtype}, which means nothing without its "
                    "scales; decompress the model first"
                )
            replace_tensor(program, name, tensor.to(device=device, dtype=current.dtype))

    def empty(self, program: Program, names: Iterable[str]) -> None:
        for name in names:
            if self._source(program, name) is not None:
                replace_tensor(program, name, _current(program, name).to("meta"))

    def stored(self, program: Program, name: str) -> Tensor:
        parameter = program.get_parameter(name).data
        dtypes = {self.folder.info(piece.tensor)[1].dtype for piece in self.found.pieces[name]}
        if {torch_dtype(dtype) for dtype in dtypes} == {parameter.dtype}:
            return parameter
        return self._read(name, parameter).to(parameter.device)

    def parts(self, program: Program, site: str) -> list[Part]:
        return [(piece.expert, piece.start, piece.stop) for piece in self.found.pieces[site]]

    def _source(self, program: Program, name: str) -> str | None:
        """The name under which the folder holds a tensor: its own, or another's that shares it."""
        first = program.tied.get(name, name)
        group = [name, first, *(other for other, owner in program.tied.items() if owner == first)]
        return next((each for each in group if each in self.found.pieces), None)

    def _read(self, name: str, like: Tensor) -> Tensor:
        return assemble(self.found.pieces[name], tuple(like.shape), self.folder.read)


def _current(program: Program, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    module = program.get_submodule(path)
    tensor = module._parameters.get(attribute)
    if tensor is None:
        tensor = module._buffers[attribute]
    assert tensor is not None
    return tensor.detach()
