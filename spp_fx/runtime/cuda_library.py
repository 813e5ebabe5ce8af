"""cuSPARSELt and CUTLASS through PyTorch's sparse tensors, which are built from packed bytes; needs torch alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from spp_fx.errors import FormatError
from spp_fx.exporters.cutlass_layout import FORMS

ALG_ID: Final = 0
"""cuSPARSELt's algorithm, PyTorch's default, with which packs are multiplied."""
OLDEST_CUSPARSELT: Final = 600
"""0.6.0: the order of metadata in a pack is known from this version on."""


class Library(Protocol):
    """A library that multiplies by 2:4 weights on one GPU.

    Attributes:
        name: with its version, such as "cuSPARSELt 0.7.1".
        device: the GPU, in words.
        sm: its compute capability, 90 for 9.0.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def sm(self) -> int: ...

    def refusal(self) -> str | None:
        """Why the library cannot be used here, None where it can."""
        ...

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """A weight (out, in) made of its stored packed parts, without compressing it again."""
        ...

    def repack(self, dense: Tensor) -> Tensor:
        """A weight (out, in) that the library packs itself."""
        ...

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (tokens, in) times a weight of `wrap` or `repack`: (tokens, out); RuntimeError where that fails."""
        ...


@dataclass(frozen=True)
class _Cuda:
    """The GPU, and PyTorch's own packing and product, which both libraries share."""

    on: torch.device

    @property
    def device(self) -> str:
        return f"{torch.cuda.get_device_name(self.on)} ({self.on})"

    @property
    def sm(self) -> int:
        major, minor = torch.cuda.get_device_capability(self.on)
        return 10 * major + minor

    def repack(self, dense: Tensor) -> Tensor:
        return to_sparse_semi_structured(dense)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)


@dataclass(frozen=True)
class CuSparseLt(_Cuda):
    """NVIDIA's cuSPARSELt; `packed` is (m, 9k/16), values, then metadata."""

    @property
    def name(self) -> str:
        version = torch.backends.cusparselt.version()
        return "cuSPARSELt" if version is None else f"cuSPARSELt {version_text(version)}"

    def refusal(self) -> str | None:
        version = torch.backends.cusparselt.version()
        if not torch.backends.cusparselt.is_available() or version is None:
            return f"torch {torch.__version__} is built without cuSPARSELt"
        if version < OLDEST_CUSPARSELT:
            return f"packs are made for cuSPARSELt {version_text(OLDEST_CUSPARSELT)} and later, this is {self.name}"
        return None

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        packed, (m, k) = parts["packed"], shape
        _check("packed", packed, (m, 9 * k // 16), packed.dtype)
        options = {"fuse_transpose_cusparselt": False, "alg_id_cusparselt": ALG_ID}
        return _sparse(SparseSemiStructuredTensorCUSPARSELT, shape, packed, None, **options)


@dataclass(frozen=True)
class Cutlass(_Cuda):
    """The CUTLASS kernels of PyTorch; `packed` is (m, k/2), the values, and `meta` is in CUTLASS' order."""

    @property
    def name(self) -> str:
        return f"CUTLASS of torch {torch.__version__}"

    def refusal(self) -> str | None:
        return None  # the kernels themselves raise where they do not run

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        packed, meta, (m, k) = parts["packed"], parts["meta"], shape
        form = FORMS.get(packed.dtype)
        if form is None:
            raise FormatError(f"CUTLASS packs hold no {packed.dtype}; export the model again")
        _check("packed", packed, (m, k // 2), packed.dtype)
        _check("meta", meta, (m, k // form.columns), form.meta)
        return _sparse(SparseSemiStructuredTensorCUTLASS, shape, packed, meta)


def _sparse(cls: Any, shape: tuple[int, int], packed: Tensor, meta: Tensor | None, **options: Any) -> Tensor:
    """A sparse tensor of PyTorch made of its packed parts, which have no transposed form."""
    return cls(
        torch.Size(shape),
        packed=packed,
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
        requires_grad=False,
        **options,
    )


def version_text(version: int) -> str:
    """cuSPARSELt's version number in words: 702 is 0.7.2."""
    return f"{version // 1000}.{version // 100 % 10}.{version % 100}"


def _check(part: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(
            f"{part} is {tensor.dtype} {list(tensor.shape)}, the shape of the weight needs {dtype} {list(shape)}; "
            "export the model again"
        )
