"""Variants of SPP that its paper compares: other starts, no beta, trained multipliers in place of a residual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spp_fx.adapters.adapter_folder import FACTORS, write_factors
from spp_fx.adapters.method import SCALE_OPTION, FactorSpec, Method, Run, register
from spp_fx.options import at_least_one, option
from spp_fx.storage.output import atomic_file


@register("spp-without-beta")
@dataclass(frozen=True)
class WithoutBeta(Method):
    """W * (1 + s rep(alpha)), alpha = 0 at the start."""

    rank: int = option(16, "Rank r.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {"alpha": FactorSpec((*stack, self.rank, n), "zeros", rows=m // self.rank, columns=1)}

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return f"rank {self.rank} does not divide {shape[-2]}" if shape[-2] % self.rank else None

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        alpha = factors["alpha"]
        return weight * (self.scale * alpha.repeat_interleave(weight.shape[-2] // alpha.shape[-2], dim=-2))

    def rate(self, run: Run) -> float:
        return run.rate_of_sum(1 / abs(self.scale))


@register("spp-multipliers")
@dataclass(frozen=True)
class Multipliers(Method):
    """W * beta * rep(alpha), both 1 at the start and stored as the difference from 1."""

    rank: int = option(16, "Rank r.", at_least_one)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "alpha": FactorSpec((*stack, self.rank, n), "zeros", rows=m // self.rank, columns=1),
            "beta": FactorSpec((*stack, m, 1), "zeros", rows=1),
        }

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return f"rank {self.rank} does not divide {shape[-2]}" if shape[-2] % self.rank else None

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        alpha, beta = factors["alpha"], factors["beta"]
        rows = alpha.repeat_interleave(weight.shape[-2] // alpha.shape[-2], dim=-2)
        return weight * (rows + beta + rows * beta)

    def rate(self, run: Run) -> float:
        return run.rate_of_sum()


STARTS = ("alpha zero", "neither zero", "both zero")


def set_start(adapter: Path, start: str, seed: int) -> None:
    """Change the start of a new SPP adapter, whose beta is zero; what is not zero is U(-1/sqrt n, 1/sqrt n)."""
    factors = load_file(adapter / FACTORS)
    generator = torch.Generator().manual_seed(seed)
    for name, value in factors.items():
        site, _, key = name.rpartition(".")
        zero = start == "both zero" or start.startswith(key.removeprefix("spp_"))
        bound = factors[f"{site}.spp_alpha"].shape[-1] ** -0.5
        value.zero_() if zero else value.uniform_(-bound, bound, generator=generator)
    with atomic_file(adapter / FACTORS, force=True) as temporary:
        write_factors(temporary, factors)
