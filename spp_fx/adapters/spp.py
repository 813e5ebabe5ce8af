"""SPP: one row of alpha for every m/r rows of the weight, one beta for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from spp_fx.adapters.method import Array, Factors, FactorSpec, Method, MethodOps, register

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_RANK = 256


@register("spp")
@dataclass(frozen=True)
class SPP(Method):
    """W * (1 + s * beta * repeat(alpha)) — SPP, ICML 2024, Eq. 4 and 5."""

    @property
    def ops(self) -> MethodOps:
        from spp_fx.adapters.ops import packed, spp_blockwise, spp_fused, spp_linear, spp_weight

        kernels = {"blockwise": spp_blockwise.OP, "fused": spp_fused.OP}
        return MethodOps(spp_linear.OP, spp_weight.OP, kernels, packed.OPS)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "spp_alpha": FactorSpec((*stack, self.rank, n), init="kaiming"),
            "spp_beta": FactorSpec((*stack, m, 1), init="zeros"),
        }

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        m = shape[-2]
        return f"rank {self.rank} does not divide its {m} output features" if m % self.rank else None

    def usable_ranks(self, shapes: Iterable[tuple[int, ...]]) -> list[int]:
        common = gcd(*(shape[-2] for shape in shapes))
        return [rank for rank in range(1, LARGEST_RANK + 1) if common % rank == 0]

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        from spp_fx.adapters.ops.spp_linear import update

        return update(weight, factors["spp_alpha"], factors["spp_beta"], self.scale)

    def rows(self, factors: Factors, start: int, stop: int) -> dict[str, Tensor]:
        import torch

        alpha, beta = factors["spp_alpha"], factors["spp_beta"]
        height = beta.shape[-2] // alpha.shape[-2]
        index = torch.arange(start, stop, device=alpha.device) // height
        return {"spp_alpha": alpha.index_select(-2, index), "spp_beta": beta[..., start:stop, :]}

    def columns(self, factors: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        return {"spp_alpha": factors["spp_alpha"][..., start:stop], "spp_beta": factors["spp_beta"]}
