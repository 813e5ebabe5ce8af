"""A frozen weight together with the factors that scale it."""

from dataclasses import dataclass

from torch import Tensor

from spp_fx.adapters.ops.rows import Rows


@dataclass(frozen=True)
class Adapted:
    """W' = W + s * W * beta * repeat(alpha).

    Attributes:
        rows: the frozen W (m, n).
        alpha: (r, n), each row repeated over m / r rows of W.
        beta: (m, 1).
        scale: s.
    """

    rows: Rows
    alpha: Tensor
    beta: Tensor
    scale: float

    def __post_init__(self) -> None:
        (m, n), (r, columns) = self.rows.shape, self.alpha.shape
        if columns != n or self.beta.shape != (m, 1) or r == 0 or m % r:
            raise ValueError(
                f"factors {tuple(self.alpha.shape)} and {tuple(self.beta.shape)} do not fit a weight {(m, n)}"
            )

    @property
    def height(self) -> int:
        """Rows of W that share a row of alpha."""
        return self.beta.shape[0] // self.alpha.shape[0]
