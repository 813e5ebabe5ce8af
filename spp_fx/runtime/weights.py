"""The weights of a model that was built without any, from the tensors of an export."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp_fx.errors import FormatError
from spp_fx.exporters import Decoded
from spp_fx.ir.binding import Binding, Parameter, Piece, assemble, bind


@dataclass(frozen=True)
class StoredWeights:
    """What an export stores for each parameter and stored buffer of a model.

    Attributes:
        folder: the export.
        model: built without weights.
        decoded: the tensors.
        slots: parameters and stored buffers.
        binding: which tensors make up which slot.
        dtypes: what each slot is computed in, as from_pretrained(dtype="auto") has it.
        shared: the parameters, each by all the names that it has.
    """

    folder: Path
    model: PreTrainedModel
    decoded: Decoded
    slots: dict[str, Parameter]
    binding: Binding
    dtypes: dict[str, torch.dtype]
    shared: tuple[tuple[str, ...], ...]

    @classmethod
    def find(cls, folder: Path, model: PreTrainedModel, decoded: Decoded) -> "StoredWeights":
        slots = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        binding = bind(model, slots, decoded.shapes)
        return cls(folder, model, decoded, slots, binding, _dtypes(model), _shared(model))

    def single(self, name: str) -> str | None:
        """The stored tensor that is a parameter as it is; None where several make it up, or none."""
        pieces = self.binding.pieces.get(name, ())
        return pieces[0].tensor if len(pieces) == 1 and pieces[0].expert is None else None

    def read(self, name: str, device: torch.device) -> Tensor:
        """A parameter or buffer in its dtype, contiguous, on a device.

        Raises:
            FormatError: nothing is stored for it, or a tensor of a type that is no weight by itself.
        """
        dtype = self.dtypes[name]
        tensor = assemble(self._pieces(name), self.slots[name].shape, self.decoded.read)
        if dtype.is_floating_point and (not tensor.is_floating_point() or tensor.itemsize < 2):
            raise FormatError(
                f"{self.folder}: {name} is stored as {tensor.dtype}, which means nothing without its scales; "
                "a quantized model cannot be loaded from an export"
            )
        return tensor.to(device=device, dtype=dtype).contiguous()

    def fill(self, device: torch.device, made: Mapping[str, Tensor]) -> None:
        """Give every parameter and buffer of the model its values, on a device; each is read once.

        Args:
            made: weights that are there already, by parameter; they have no other name.
        """
        for names in self.shared:
            stored = [name for name in names if name in self.binding.pieces] or [names[0]]
            first = made[stored[0]] if stored[0] in made else self.read(stored[0], device)
            parameter = nn.Parameter(first, requires_grad=False)
            for name in names:
                own = parameter
                if name in stored[1:]:
                    # As from_pretrained has it: what is stored under both names and differs is not shared.
                    other = self.read(name, device)
                    own = parameter if torch.equal(first, other) else nn.Parameter(other, requires_grad=False)
                owner, attribute = owner_of(self.model, name)
                owner._parameters[attribute] = own
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            owner, attribute = owner_of(self.model, name)
            stored = name in self.binding.pieces
            owner._buffers[attribute] = self.read(name, device) if stored else buffer.to(device)

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        if name not in self.binding.pieces:
            reason = self.binding.refused.get(name, "the export holds no tensor for it")
            raise FormatError(f"{self.folder}: {name}: {reason}; export the model again")
        return self.binding.pieces[name]


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and the attribute that it is there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def first_floating(decoded: Decoded) -> torch.dtype | None:
    """What from_pretrained(dtype="auto") makes a model of whose configuration says no dtype."""
    tensors = (decoded.read(name) for name in decoded.shapes)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def _shared(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(map(tuple, groups.values()))


def _dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtypes that the model was built in, but for what transformers keeps in float32."""
    main = cast(torch.dtype, model.config.dtype)
    kept = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(main)]

    def choose(name: str, built: torch.dtype) -> torch.dtype:
        keep = built.is_floating_point and any(pattern.search(name) for pattern in kept)
        return torch.float32 if keep else built

    return {name: choose(name, tensor.dtype) for name, tensor in model.state_dict().items()}
