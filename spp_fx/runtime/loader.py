"""load: the Hugging Face model of an export folder, with packed weights where a GPU can use them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.format import FORMATS, Decoded, decoding_formats
from spp_fx.exporters.manifest import MANIFEST, Manifest, TensorRecord, read_manifest
from spp_fx.exporters.packed import open_files
from spp_fx.graph.binding import Binding, Parameter, assemble, bind
from spp_fx.graph.model import Readable, check_task, hollow_model
from spp_fx.runtime.cuda_library import CuSparseLt, Cutlass, Library
from spp_fx.runtime.trust import PackedSite, SiteForm, decide, make_weight
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.links import links_option
from spp_fx.storage.safetensors import Shard, torch_dtype


@dataclass(frozen=True)
class StoredWeights:
    """The stored tensors of each parameter and stored buffer of a model.

    Attributes:
        folder: the export.
        model: built without weights.
        decoded: the tensors.
        slots: parameters and stored buffers.
        binding: which tensors make up which slot.
        dtypes: of each slot, as from_pretrained(dtype="auto") chooses it.
        shared: for each parameter, all its names.
    """

    folder: Path
    model: PreTrainedModel
    decoded: Decoded
    slots: dict[str, Parameter]
    binding: Binding
    dtypes: dict[str, torch.dtype]
    shared: tuple[tuple[str, ...], ...]

    @classmethod
    def find(cls, folder: Path, model: PreTrainedModel, decoded: Decoded) -> "StoredWeights":
        slots = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        binding = bind(model, slots, decoded.shapes)
        return cls(folder, model, decoded, slots, binding, _dtypes(model), _shared(model))

    def single(self, name: str) -> str | None:
        """The stored tensor that is a parameter; None where several make it up, or none."""
        matrices = self.binding.matrices.get(name, ())
        is_single = len(matrices) == 1 and matrices[0].expert is None and matrices[0].offset is None
        return matrices[0].tensor if is_single else None

    def read(self, name: str, device: torch.device) -> Tensor:
        """A parameter or buffer in its dtype, contiguous, on a device.

        Raises:
            FormatError: nothing is stored for it, or a tensor of a type that needs scales.
        """
        if name not in self.binding.matrices:
            reason = self.binding.refused.get(name, "the export holds no tensor for it")
            raise FormatError(f"{self.folder}: {name}: {reason}; export the model again")
        dtype = self.dtypes[name]
        tensor = assemble(self.binding.matrices[name], self.slots[name].shape, self.decoded.read)
        if dtype.is_floating_point and (not tensor.is_floating_point() or tensor.itemsize < 2):
            raise FormatError(
                f"{self.folder}: {name} is stored as {tensor.dtype}, which means nothing without its scales; "
                "a quantized model cannot be loaded from an export"
            )
        return tensor.to(device=device, dtype=dtype).contiguous()

    def fill(self, device: torch.device, made: Mapping[str, Tensor]) -> None:
        """Give every parameter and buffer of the model its values, on a device; each is read once.

        Args:
            made: weights by parameter that need not be read; they have no other name.
        """
        for names in self.shared:
            stored = [name for name in names if name in self.binding.matrices] or [names[0]]
            first = made[stored[0]] if stored[0] in made else self.read(stored[0], device)
            parameter = nn.Parameter(first, requires_grad=False)
            for name in names:
                own = parameter
                if name in stored[1:]:
                    # As in from_pretrained: tensors stored under both names that differ are not shared.
                    other = self.read(name, device)
                    own = parameter if torch.equal(first, other) else nn.Parameter(other, requires_grad=False)
                owner, attribute = owner_of(self.model, name)
                owner._parameters[attribute] = own
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            owner, attribute = owner_of(self.model, name)
            stored = name in self.binding.matrices
            owner._buffers[attribute] = self.read(name, device) if stored else buffer.to(device)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and the name of its attribute there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _shared(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(map(tuple, groups.values()))


def _dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtypes that the model was built in, float32 where transformers keeps that."""
    main = cast(torch.dtype, model.config.dtype)
    kept = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(main)]

    def choose(name: str, built: torch.dtype) -> torch.dtype:
        keep = built.is_floating_point and any(pattern.search(name) for pattern in kept)
        return torch.float32 if keep else built

    return {name: choose(name, tensor.dtype) for name, tensor in model.state_dict().items()}


PARTS: Final[dict[str, tuple[str, ...]]] = {
    "cusparselt": ("packed",),
    "neutral": (),
    "cutlass": ("packed", "meta"),
}
"""The layouts that a library multiplies by, and the stored tensors NAME.PART of a pack."""


def dense_reason(record: TensorRecord, name: str | None, stored: StoredWeights) -> str | None:
    """Why a weight cannot run packed whatever the GPU; None where it can."""
    if record.layout not in PARTS:
        return record.reason or f"it is stored as {record.layout}, which no library multiplies by"
    if name is None:
        return "it is part of a stack, the libraries take one matrix"
    owner, attribute = owner_of(stored.model, name)
    if type(owner).forward is not nn.Linear.forward or attribute != "weight" or record.transposed:
        return f"its module is a {type(owner).__name__}, not a plain linear"
    others = next(names for names in stored.shared if name in names)
    if len(others) > 1:
        return f"it is shared by {' and '.join(others)}"
    dtype = stored.dtypes[name]
    if dtype != torch_dtype(record.dtype):
        return f"it is packed as {record.dtype}, the model computes in {str(dtype).removeprefix('torch.')}"
    return None


def packed_site(
    record: TensorRecord,
    name: str,
    stored: StoredWeights,
    files: Callable[[], Mapping[str, Shard]],
    manifest: Manifest,
    device: torch.device,
) -> PackedSite:
    parts = PARTS[record.layout]
    sm = manifest.requirements.get("sm")
    if sm is not None and not isinstance(sm, int):
        raise FormatError(f"{stored.folder / MANIFEST}: requirements.sm: {sm!r} is not a number")

    def read_parts() -> dict[str, Tensor]:
        names = {part: f"{record.name}.{part}" for part in parts}
        return {part: files()[name].read(name).to(device) for part, name in names.items()}

    m, k = record.shape
    return PackedSite(
        name=record.name,
        shape=(m, k),
        dtype=torch_dtype(record.dtype),
        layout=f"{record.layout} of spp-fx {manifest.spp_fx_version}",
        sm=sm,
        unpacked=None if parts else record.reason or "the export holds no pack of it, only the neutral form",
        parts=read_parts,
        dense=lambda: stored.read(name, device),
    )


Libraries = Callable[[str], Library]
"""The library for a layout of `PARTS`."""


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
    shape was compared with the dense product on that GPU. A weight whose pack fails is packed again there, or
    runs dense, with a `PackWarning`. `model.spp_fx_sites` holds the `SiteForm` of each sparse weight.

    Args:
        export_folder: of format cusparselt, cutlass, sparse-bitmask or safetensors.
        device: where the model is to run.
        trust_remote_code: whether the folder's own model code may run.
        allow_links: follow symbolic links that leave a folder; see `storage.links`.

    Returns:
        The model in eval mode, without gradients, in the dtype that from_pretrained(dtype="auto") gives it.

    Raises:
        UsageError: not an export folder, an export that is a program of its own (onnx), or no such device.
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
    """`load` with given libraries; None decodes every weight to dense."""
    manifest = _manifest(folder)
    stored = _hollow(folder, decode(folder, manifest), trust_remote_code)
    forms: dict[str, SiteForm] = {}
    packs: dict[str, list[PackedSite]] = {}
    parameters = {tensor: name for name in stored.slots if (tensor := stored.single(name))}
    files = cache(lambda: open_files(folder, manifest))
    for record in manifest.tensors:
        name = parameters.get(record.name)
        reason = dense_reason(record, name, stored)
        if libraries is None or name is None or reason:
            forms[record.name] = SiteForm("dense", reason or f"{device.type} has no 2:4 product")
        else:
            site = packed_site(record, name, stored, files, manifest, device)
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
        UsageError: the format is a program of its own.
    """
    format = FORMATS.find(manifest.format)
    if not format.program:
        return format.decode(folder, manifest)
    program = next((name for name in manifest.files if name.endswith(".onnx")), None)
    run = f"run {folder / program} with onnxruntime" if program else "run it with what it was made for"
    raise UsageError(
        f"{folder}: an export of format {manifest.format} is a program of its own: {run}, or export the model "
        f"in a format that can be loaded ({decoding_formats()})"
    )


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        what = "has no export.json; export it with 'spp-fx export', or load it with transformers"
        raise UsageError(f"{folder}: {what if folder.is_dir() else 'does not exist'}")
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
    check_task(folder, "runtime.load")
    dtype = None
    if (
        config.get("dtype", config.get("torch_dtype")) is None
    ):  # from_pretrained(dtype="auto") takes the weights'
        tensors = (decoded.read(name) for name in decoded.shapes)
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    model = hollow_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    return StoredWeights.find(folder, model, decoded)
