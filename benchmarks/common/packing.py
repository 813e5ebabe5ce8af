"""2:4 weights, their packs, and the libraries that multiply by them, with little more than torch installed."""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import spp_fx
from spp_fx.runtime.cuda_library import CuSparseLt, Cutlass, Library
from spp_fx.runtime.trust import PackedSite, PackWarning, SiteForm, decide

FORMATS = ("cusparselt", "cutlass")


@dataclass(frozen=True)
class Decoding:
    """What stands for a library on a CPU: a pack is decoded, its product is the dense one."""

    layout: str
    name: str = "dense product of the decoded pack"
    device: str = "CPU"
    sm: int = 80

    def refusal(self) -> str | None:
        return None

    def wrap(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        reader = _layout(f"{self.layout}_layout")
        if self.layout == "cutlass":
            return reader.unpack(parts["packed"], parts["meta"])
        return reader.unpack(parts["packed"], shape, self.sm)

    def repack(self, dense: Tensor) -> Tensor:
        return dense.clone()

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)


def library(layout: str, device: torch.device) -> Library:
    if device.type != "cuda":
        return Decoding(layout)
    return Cutlass(device) if layout == "cutlass" else CuSparseLt(device)


def form_name(layout: str, device: torch.device) -> str:
    """What times are called by: on a CPU nothing runs packed."""
    return layout if device.type == "cuda" else f"dense_decoded_from_{layout}"


def sparse_weight(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(m, k), two random entries of every four kept, as large as at the start of training."""
    weight = torch.empty(m, k, dtype=dtype, device=device).normal_(0, 0.02)
    # A group with fewer than two entries leaves the choice of the other slots to who packs it.
    weight.masked_fill_(weight == 0, 0.02)
    prune(weight)
    return weight


def prune(weight: Tensor) -> None:
    """Clear two random entries of every four columns, in place, some rows at a time."""
    for rows in weight.split(4096):
        scores = torch.rand(rows.shape[0], rows.shape[1] // 4, 4, device=weight.device)
        cleared = scores.topk(2, dim=-1).indices
        rows.view(rows.shape[0], -1, 4).scatter_(-1, cleared, 0)


def pack(weight: Tensor, layout: str, sm: int) -> dict[str, Tensor]:
    """The stored tensors of a weight, made on the CPU as an export makes them, on the weight's device."""
    module, stored = _layout(f"{layout}_layout"), weight.cpu()
    if layout == "cutlass":
        packed, meta = module.pack(stored)
        return {"packed": packed.to(weight.device), "meta": meta.to(weight.device)}
    return {"packed": module.pack(stored, sm).to(weight.device)}


def packed_site(name: str, weight: Tensor, layout: str, sm: int) -> PackedSite:
    """A dense weight as if it came from an export for this GPU; one that export refuses is packed at load."""
    m, k = weight.shape
    module = _layout(f"{layout}_layout")
    made_for = {} if layout == "cutlass" else {"sm": sm}
    return PackedSite(
        name=name,
        shape=(m, k),
        dtype=weight.dtype,
        layout=layout,
        sm=made_for.get("sm"),
        unpacked=module.refusal((m, k), weight.dtype, **made_for),
        parts=lambda: pack(weight, layout, sm),
        dense=lambda: weight,
    )


def decide_quietly(sites: list[PackedSite], chosen: Library) -> dict[str, SiteForm]:
    """What the loader would decide; the reasons are in the forms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PackWarning)
        return decide(sites, chosen, {})


def first_difference(ours: Tensor, theirs: Tensor, values: int) -> dict[str, Any]:
    """How the bytes of two packs differ; `values` is how many bytes come before the metadata."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs))
    if len(a) != len(b):
        return {"same": False, "our_bytes": len(a), "their_bytes": len(b)}
    differing = (a != b).nonzero()
    if not len(differing):
        return {"same": True, "bytes": len(a)}
    first = int(differing[0])
    where = "values" if first < values else "metadata"
    place = first if first < values else first - values
    return {
        "same": False, "bytes": len(a), "differing": len(differing), "first": first, "in": where,
        "byte_there": place, "ours": int(a[first]), "theirs": int(b[first]),
    }  # fmt: skip


def _layout(name: str) -> Any:
    """A module of spp_fx.exporters. Packing needs torch alone: without pydantic, which locks and manifests
    need, the modules are taken out of their packages."""
    if find_spec("pydantic") is None:
        for package in ("exporters", "sparsity"):
            _bare(f"spp_fx.{package}", Path(spp_fx.__file__).parent / package)
    return import_module(f"spp_fx.exporters.{name}")


def _bare(name: str, folder: Path) -> None:
    """Let the modules of a package be imported without what its __init__ imports."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules.setdefault(name, package)
