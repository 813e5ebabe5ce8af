"""Stand-ins for the CUDA libraries, right and wrong, that run on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from spp_fx.exporters.cusparselt_layout import unpack


@dataclass(frozen=True)
class Right:
    """A library whose packed weights are dense tensors, decoded from the bytes of a pack."""

    sm: int = 80
    name: str = "stand-in 1.0.0"
    device: str = "a GPU"
    calls: list[str] = field(default_factory=list)

    def refusal(self) -> str | None:
        return None

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        self.calls.append("wrap")
        return unpack(parts["packed"], shape, 80)

    def repack(self, dense: Tensor) -> Tensor:
        self.calls.append("repack")
        return dense.clone()

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        self.calls.append("multiply")
        return linear(x, weight)


@dataclass(frozen=True)
class WrongOrder(Right):
    """Reads two groups of columns of a pack the other way round."""

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        weight = super().wrap(parts, shape)
        weight[:, :8] = weight[:, [4, 5, 6, 7, 0, 1, 2, 3]]
        return weight


@dataclass(frozen=True)
class RepacksWrong(WrongOrder):
    """Nor can it pack by itself."""

    def repack(self, dense: Tensor) -> Tensor:
        return super().repack(dense) * 2


@dataclass(frozen=True)
class Refuses(Right):
    """Multiplies by nothing at all, as a kernel does on a GPU that it was not built for."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("Supported only on GPUs with compute capability 8.x\nat some line")


@dataclass(frozen=True)
class Missing(Right):
    """Is not there."""

    def refusal(self) -> str | None:
        return "torch is built without it"

    def repack(self, dense: Tensor) -> Tensor:
        raise RuntimeError("torch is built without it")


@dataclass(frozen=True)
class OutOfMemory(Right):
    """Finds no room on the GPU."""

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        raise torch.OutOfMemoryError("no room")
