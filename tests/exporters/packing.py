"""What tests of packed formats share."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spp_fx.sparsity import packing
from spp_fx.sparsity.lock import LOCK_NAME, Lock, make_entry
from spp_fx.sparsity.pattern import detect_pattern
from spp_fx.sparsity.scan import pack_mask

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def without_kernels() -> Generator[None, None, None]:
    """The torch code, which defines what compiled loops do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_compiled", lambda: None)
        yield


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def random_sparse(m: int, k: int, dtype: torch.dtype, seed: int, group: int = 4) -> Tensor:
    """(m, k) of finite numbers, subnormals among them, in zero to half of the places of every group."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        scale = torch.tensor([1.0, float(torch.finfo(dtype).smallest_normal) / 4], dtype=torch.float64)
        factor = scale[torch.randint(0, 2, (m, k), generator=generator)]
        dense = ((torch.rand(m, k, generator=generator) + 0.5) * factor).to(dtype)
        dense = torch.where(torch.rand(m, k, generator=generator) < 0.5, -dense, dense)
    else:
        dense = torch.randint(1, 127, (m, k), generator=generator).to(dtype)
    order = torch.rand(m, k // group, group, generator=generator).argsort(-1)
    kept = torch.randint(0, group // 2 + 1, (m, k // group, 1), generator=generator)
    return torch.where((order < kept).view(m, k), dense, torch.zeros_like(dense))


def bare_folder(
    folder: Path, sites: Mapping[str, Tensor], others: Mapping[str, Tensor], transposed: frozenset[str]
) -> Path:
    """A folder of weights with a lock, and no model that could be traced."""
    folder.mkdir(parents=True)
    stored = {name: w.t().contiguous() if name in transposed else w for name, w in sites.items()}
    save_file(stored | dict(others), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none"}\n')
    masks = {name: pack_mask(weight) for name, weight in sites.items()}
    lock = Lock.of(
        make_entry(name, "linear", mask, detect_pattern(mask), name in transposed)
        for name, mask in masks.items()
    )
    (folder / LOCK_NAME).write_text(lock.dumps())
    return folder
