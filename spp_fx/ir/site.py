"""A site: one weight matrix (or stack of matrices) that the toolkit may treat."""

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["linear", "conv1d", "matmul", "experts"]


ROUTES = "routes tokens to experts"
GATES = "gates a branch by one number"


@dataclass(frozen=True)
class LeftOut:
    """Why a parameter of two or more dimensions is not a site.

    Attributes:
        reason: in words that follow the parameter's name.
        known: the graph proves that the parameter is not the weight of a linear that could be sparse
            (a table of embeddings, one that is only added or multiplied elementwise, a router). False for
            everything else: the parameter may be a linear that was not understood, or not reached.
    """

    reason: str
    known: bool


@dataclass(frozen=True)
class Site:
    """One weight, seen in its canonical orientation whatever its storage.

    Attributes:
        name: the checkpoint's name of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        kind: the form the graph used it in; `experts` is a 3-D stack, the others are matrices.
        shape: (out, in), or (experts, out, in).
        dtype: the stored dtype.
        transposed: the weight is stored (in, out); N:M groups still run along `in`.
        layer: index of the decoder layer that owns it, None outside of the layers.
        uses: how many nodes of the program use the weight as a linear.
        tied_to: name of the embedding that shares the weight, if one does.
        is_head: the linear produces the logits.
        role: what the graph does with its result, where that is a reason to leave the weight as it is:
            `ROUTES` or `GATES`; None for every other linear.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    layer: int | None
    uses: int
    tied_to: str | None
    is_head: bool
    role: str | None = None

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def factor_attribute(parameter: str, factor: str) -> str:
    """Attribute under which the module that owns `parameter` holds an adapter's factor."""
    return factor if parameter == "weight" else f"{parameter}_{factor}"
