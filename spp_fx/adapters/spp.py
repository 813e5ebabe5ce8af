"""SPP: one row of alpha for every m/r rows of the weight, one beta for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, cast

from spp_fx.adapters.method import (
    DROPOUT_OPTION,
    SCALE_OPTION,
    Factors,
    FactorSpec,
    FoldKernel,
    Kernels,
    Method,
    Run,
    register,
    work_dtype,
)
from spp_fx.compiled import optional_module
from spp_fx.options import at_least_one, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_RANK = 256


@register("spp")
@dataclass(frozen=True)
class SPP(Method):
    """W * (1 + s * beta * repeat(alpha)) — SPP, ICML 2024, Eq. 4 and 5."""

    masked_gradient: ClassVar[bool] = True

    rank: int = option(16, "Rank r; for spp a divisor of a site's outputs, or it is skipped.", at_least_one)
    scale: float = option(2.0, *SCALE_OPTION)
    dropout: float = option(0.0, *DROPOUT_OPTION)

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        *stack, m, n = shape
        return {
            "spp_alpha": FactorSpec((*stack, self.rank, n), "kaiming", rows=m // self.rank, columns=1),
            "spp_beta": FactorSpec((*stack, m, 1), "zeros", rows=1),
        }

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        m = shape[-2]
        return f"rank {self.rank} does not divide its {m} output features" if m % self.rank else None

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        alpha, beta = factors["spp_alpha"], factors["spp_beta"]
        rows = weight.shape[-2] // alpha.shape[-2]
        return weight * (self.scale * beta * alpha.repeat_interleave(rows, dim=-2))

    def tile(self, weight: Tensor, factors: Factors, base: float, out: Tensor) -> None:
        import torch

        work = work_dtype(weight, factors["spp_alpha"])
        weight, factor = weight.to(work), self._factor(factors, work)
        result = out if out.dtype == work else factor
        if base:
            torch.addcmul(weight, weight, factor, value=1.0, out=result)
        else:
            torch.mul(weight, factor, out=result)
        if result is factor:
            out.copy_(factor)

    def pullback(self, grad: Tensor, weight: Tensor, factors: Factors, grads: dict[str, Tensor]) -> None:
        """dbeta_i = s sum_c (G W)_ic alpha_jc and dalpha_jc = s sum_{i in block j} beta_i (G W)_ic."""
        import torch

        alpha, beta = factors["spp_alpha"], factors["spp_beta"]
        work = work_dtype(grad, alpha)
        product = _product(grad, weight, work).view(len(alpha), -1, alpha.shape[1])
        row = (alpha.to(work) * self.scale).unsqueeze(2)
        grads["spp_beta"] += torch.bmm(product, row).view(-1, 1)
        column = (beta.to(work) * self.scale).view(len(alpha), 1, -1)
        grads["spp_alpha"] += torch.bmm(column, product).squeeze(1)

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor]:
        """alpha: of each block of W * G, the first right singular vector.

        At beta = 0, dL/dbeta_i = s (W * G)_i alpha_j, so a first step along it gains s² |(W * G)_j alpha_j|².
        """
        from spp_fx.adapters.directions import at_norm_of, right_vectors

        alpha = factors["spp_alpha"]
        blocks = (weight * grad).view(len(alpha), -1, weight.shape[1])
        return {**factors, "spp_alpha": at_norm_of(alpha, right_vectors(blocks, 1).squeeze(1))}

    def kernels(self, device: str) -> Kernels | None:
        modules = {"cpu": "spp_fx.adapters.cpu", "cuda": "spp_fx.adapters.gpu"}
        return cast("Kernels | None", optional_module(modules[device])) if device in modules else None

    def fold_kernel(self, factors: Mapping[str, Any], dtype: str) -> FoldKernel | None:
        if (cpu := optional_module("spp_fx.adapters.cpu")) is None:
            return None
        alpha, scaled = factors["spp_alpha"], self.scale * factors["spp_beta"][:, 0]
        kernel, height = cpu.FOLDS[dtype], len(scaled) // len(alpha)
        return lambda stored, out, start: kernel(stored, alpha, scaled[start:], height, start, 0.0, True, out)

    def rate(self, run: Run) -> float:
        """Every weight is multiplied by one product of an alpha and a beta."""
        return run.rate_of_product(self.scale)

    def remedy(self, shapes: Iterable[tuple[int, ...]]) -> str | None:
        return f"ranks that fit all matched sites: {', '.join(map(str, self.usable_ranks(shapes)))}"

    def usable_ranks(self, shapes: Iterable[tuple[int, ...]]) -> list[int]:
        """The ranks up to 256 that every one of these shapes admits."""
        common = gcd(*(shape[-2] for shape in shapes))
        return [rank for rank in range(1, LARGEST_RANK + 1) if common % rank == 0]

    def _factor(self, factors: Factors, dtype: torch.dtype) -> Tensor:
        """s * beta * repeat(alpha) in the workspace."""
        import torch

        from spp_fx.adapters.rows import workspace

        alpha, beta = factors["spp_alpha"], factors["spp_beta"]
        row, column = alpha.to(dtype).unsqueeze(1), (beta * self.scale).to(dtype).view(len(alpha), -1, 1)
        out = workspace("tile", len(beta), alpha.shape[1], dtype, alpha.device)
        torch.mul(row, column, out=out.view(len(alpha), -1, alpha.shape[1]))
        return out


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b in dtype, where no conversion is needed in the workspace."""
    import torch

    from spp_fx.adapters.rows import workspace

    if a.dtype == b.dtype == dtype:
        return torch.mul(a, b, out=workspace("tile", a.shape[0], a.shape[1], dtype, a.device))
    return a.to(dtype, copy=True).mul_(b)
