"""load: the Hugging Face model of an export folder, its sparse weights packed where a GPU can be trusted with it."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from spp_fx.checkpoint import ModelFolder, Shard
from spp_fx.checkpoint.links import links_option
from spp_fx.errors import UsageError
from spp_fx.exporters import FORMATS, Decoded, find_format
from spp_fx.exporters.manifest import MANIFEST, Manifest, read_manifest
from spp_fx.exporters.packed_reader import WEIGHTS
from spp_fx.ir.model import hollow_model
from spp_fx.ir.unreadable import Readable, check_causal
from spp_fx.runtime.library import CuSparseLt, Cutlass, Library
from spp_fx.runtime.sites import dense_reason, packed_site
from spp_fx.runtime.trust import PackedSite, SiteForm, decide, make_weight
from spp_fx.runtime.weights import StoredWeights, first_floating

Libraries = Callable[[str], Library]
"""The library for a layout of `sites.PARTS`."""


@links_option
def load(
    export_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    allow_links: bool = False,
) -> PreTrainedModel:
    """The Hugging Face model of an export folder, ready to run and to generate.

    On a CPU every weight is decoded to dense, and logits equal those of the model folder that was exported
    to the bit. On a CUDA device the weights of `cusparselt` and `cutlass` exports become
    torch.sparse.SparseSemiStructuredTensor, built straight from the packed bytes once the first of each
    shape was compared with the dense product on that GPU; a pack that is not trusted is packed anew there, or
    runs dense, with a `PackWarning`. `model.spp_fx_sites` holds the `SiteForm` of each sparse weight.

    Args:
        export_folder: of format cusparselt, cutlass, sparse-bitmask or safetensors.
        device: where the model is to run.
        trust_remote_code: whether the folder's own model code may run.
        allow_links: follow symbolic links that leave a folder; see `checkpoint.links`.

    Returns:
        The model in eval mode, without gradients, in the dtype that from_pretrained(dtype="auto") gives it.

    Raises:
        UsageError: no export folder, an export that is a program of its own (onnx), or no such device.
        FormatError: a file is damaged, or the export lacks a tensor of the model.
    """
    target = _device(device)
    libraries = partial(cuda_library, device=target) if target.type == "cuda" else None
    return load_with(Path(export_folder), target, libraries, trust_remote_code)


def cuda_library(layout: str, device: torch.device) -> Library:
    """The library that multiplies by packs of a layout on a CUDA device."""
    return Cutlass(device) if layout == "cutlass" else CuSparseLt(device)


def load_with(
    folder: Path, device: torch.device, libraries: Libraries | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """`load`, with the libraries that it is to use; None decodes every weight to dense."""
    manifest = _manifest(folder)
    stored = _hollow(folder, decode(folder, manifest), trust_remote_code)
    forms: dict[str, SiteForm] = {}
    packs: dict[str, list[PackedSite]] = {}
    parameters = {tensor: name for name in stored.slots if (tensor := stored.single(name))}
    shard = cache(lambda: Shard.open(folder / WEIGHTS))
    for record in manifest.tensors:
        name = parameters.get(record.name)
        reason = dense_reason(record, name, stored)
        if libraries is None or name is None or reason:
            forms[record.name] = SiteForm("dense", reason or f"{device.type} has no 2:4 product")
        else:
            site = packed_site(record, name, stored, shard, manifest, device)
            packs.setdefault(record.layout, []).append(site)
    made: dict[str, Tensor] = {}
    for layout, sites in packs.items():
        assert libraries is not None
        library = libraries(layout)
        forms |= decide(sites, library)
        made |= {parameters[site.name]: make_weight(site, forms[site.name].form, library) for site in sites}
    stored.fill(device, made)
    model = stored.model
    if (folder / "generation_config.json").is_file():
        with Readable(folder, "its generation_config.json cannot be loaded"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    cast(Any, model).spp_fx_sites = {record.name: forms[record.name] for record in manifest.tensors}
    return model.eval()


def decode(folder: Path, manifest: Manifest) -> Decoded:
    """The model's tensors out of an export.

    Raises:
        UsageError: the format is a program of its own, which no tensors are taken from.
    """
    format = find_format(manifest.format)
    if format.decode is not None:
        return format.decode(folder, manifest)
    program = next((name for name in manifest.files if name.endswith(".onnx")), None)
    run = f"run {folder / program} with onnxruntime" if program else "run it with what it was made for"
    loadable = ", ".join(sorted(other.name for other in FORMATS.values() if other.decode is not None))
    raise UsageError(
        f"{folder}: an export of format {manifest.format} is a program of its own: {run}, or export the model "
        f"in a format that can be loaded ({loadable})"
    )


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        what = "has no export.json; make an export of it with 'spp-fx export', or load it with transformers"
        raise UsageError(f"{folder}: {what if folder.is_dir() else 'there is no such folder'}")
    return read_manifest(folder)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: {str(error).splitlines()[0]}") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: an export runs on 'cpu' or 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA device; use device='cpu'"
        )
    return found


def _hollow(folder: Path, decoded: Decoded, trust_remote_code: bool) -> StoredWeights:
    """The folder's model without weights, and where they are."""
    config = ModelFolder.open(folder, weights=False).config
    check_causal(folder, "runtime.load")
    unsaid = config.get("dtype", config.get("torch_dtype")) is None
    dtype = first_floating(decoded) if unsaid else None
    model = hollow_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    return StoredWeights.find(folder, model, decoded)
