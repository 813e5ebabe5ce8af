"""What an adapter method is: trainable factors, and the weight that they stand for.

torch is imported where numbers are made: an adapter folder is read and checked without it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from spp_fx.errors import UsageError
from spp_fx.registry import Registry, naming

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._ops import OpOverload

Factors: TypeAlias = "Mapping[str, Tensor]"
Array = TypeVar("Array", bound=Any)


@dataclass(frozen=True)
class FactorSpec:
    """Shape and start of one trainable factor; `kaiming` is U(-1/sqrt n, 1/sqrt n), n the last extent."""

    shape: tuple[int, ...]
    init: Literal["zeros", "kaiming"]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class MethodOps:
    """The torch ops of a method.

    Attributes:
        linear: `(x, weight, *factors, bias, seed, scale, dropout) -> y`: the definition, as one op.
        weight: `(weight, *factors, scale, base) -> base * weight + update`, for stacks of experts.
        kernels: faster executions of `linear`, by name.
        packed: the fused execution on a packed weight, by packing: the tensors of the packing follow x.
    """

    linear: OpOverload
    weight: OpOverload
    kernels: Mapping[str, OpOverload]
    packed: Mapping[str, OpOverload]


@dataclass(frozen=True)
class Method(ABC):
    """An adapter method, its settings as fields.

    A method states one formula, `update`: the change of the weight that its factors stand for. The
    reference subgraph, the kernels, the fold and the tests are all held to it.

    Attributes:
        rank: the method's rank r.
        scale: the factor s of the update.
        dropout: probability on the adapter branch's input while training.
    """

    name: ClassVar[str]

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"{self.name}: rank must be at least 1, got {self.rank}")
        if not isfinite(self.scale) or self.scale == 0:
            raise UsageError(f"{self.name}: scale must be a finite number other than 0, got {self.scale}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout must be in [0, 1), got {self.dropout}")

    @property
    @abstractmethod
    def ops(self) -> MethodOps:
        """How it is executed."""

    @abstractmethod
    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        """The trainable factors of a site of canonical shape (..., out, in), by name."""

    @abstractmethod
    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a site of this shape cannot be adapted, or None."""

    @abstractmethod
    def usable_ranks(self, shapes: Iterable[tuple[int, ...]]) -> list[int]:
        """The ranks up to 256 that every one of these shapes admits."""

    @abstractmethod
    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        """The change of `weight` (..., out, in) that the factors stand for; zero where weight is zero."""

    @abstractmethod
    def rows(self, factors: Factors, start: int, stop: int) -> dict[str, Tensor]:
        """Factors that give rows start..stop of the update when called with those rows of the weight."""

    @abstractmethod
    def columns(self, factors: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """Factors, of torch or numpy, that give columns start..stop of the update for those of the weight."""

    def effective_weight(self, weight: Tensor, **factors: Tensor) -> Tensor:
        """The weight that the adapted site stands for, in the promoted dtype of its inputs."""
        return weight + self.update(weight, **factors)

    def parameters(self) -> dict[str, Any]:
        """The settings, as the adapter's configuration stores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


METHODS = Registry[type[Method]]("adapter method", "spp_fx.methods", package="spp_fx.adapters")
register = naming(METHODS)


def make_method(name: str, **settings: Any) -> Method:
    """A method by name with its settings; UsageError lists what is known."""
    return METHODS.find(name)(**settings)


def initial_factor(spec: FactorSpec, key: str, seed: int, device: torch.device) -> Tensor:
    """A factor's start in float32: the same for the same seed and key, whatever the order of sites."""
    import torch

    if spec.init == "zeros" or device.type == "meta":
        return torch.zeros(spec.shape, device=device)
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = 1 / sqrt(spec.shape[-1])
    return torch.empty(spec.shape).uniform_(-bound, bound, generator=generator).to(device)
