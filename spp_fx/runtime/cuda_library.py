"""The libraries that multiply by 2:4 weights on a GPU, as far as a loader needs them.

Both are reached through PyTorch's wrappers (torch/sparse/semi_structured.py), which can be built straight
from packed bytes. Nothing here needs more than torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from spp_fx.errors import FormatError

# Their constructors are typed as those of plain tensors.
_CUSPARSELT = cast(Any, SparseSemiStructuredTensorCUSPARSELT)
_CUTLASS = cast(Any, SparseSemiStructuredTensorCUTLASS)

ALG_ID: Final = 0
"""The algorithm that packs are made for and multiplied by: PyTorch's default."""
OLDEST_CUSPARSELT: Final = 600
"""0.6.0: the order of metadata in a pack is known from this version on."""

#: For each element type of a CUTLASS pack, that of its metadata and how many columns one entry describes.
_CUTLASS_META: Final[dict[torch.dtype, tuple[torch.dtype, int]]] = {
    torch.float16: (torch.int16, 16),
    torch.bfloat16: (torch.int16, 16),
    torch.int8: (torch.int32, 32),
    torch.float32: (torch.int16, 8),
}


class Library(Protocol):
    """What a loader asks of a library on one GPU.

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
        """Why the library cannot be used here at all, None where it can."""
        ...

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """A weight (out, in) of its packed parts as they are stored, without recompression."""
        ...

    def repack(self, dense: Tensor) -> Tensor:
        """A weight (out, in) packed by the library itself."""
        ...

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (tokens, in) by what `wrap` or `repack` made: (tokens, out). RuntimeError where it refuses."""
        ...


@dataclass(frozen=True)
class _Cuda:
    """What both libraries have in common: the GPU, and PyTorch's own way to pack and to multiply."""

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
    """NVIDIA's cuSPARSELt: `packed` (m, 9k/16), the values and after them the metadata."""

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
        return _CUSPARSELT(
            torch.Size(shape),
            packed=packed,
            meta=None,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
            fuse_transpose_cusparselt=False,
            alg_id_cusparselt=ALG_ID,
            requires_grad=False,
        )


@dataclass(frozen=True)
class Cutlass(_Cuda):
    """The CUTLASS kernels in PyTorch itself: `packed` (m, k/2), the values, and `meta`, in CUTLASS' order."""

    @property
    def name(self) -> str:
        return f"CUTLASS of torch {torch.__version__}"

    def refusal(self) -> str | None:
        return None  # which GPUs its kernels run on is for the kernels to say

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        packed, meta, (m, k) = parts["packed"], parts["meta"], shape
        if packed.dtype not in _CUTLASS_META:
            raise FormatError(f"CUTLASS packs hold no {packed.dtype}; export the model again")
        dtype, columns = _CUTLASS_META[packed.dtype]
        _check("packed", packed, (m, k // 2), packed.dtype)
        _check("meta", meta, (m, k // columns), dtype)
        return _CUTLASS(
            torch.Size(shape),
            packed=packed,
            meta=meta,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
            requires_grad=False,
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
