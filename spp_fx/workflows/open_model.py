"""Opening a model folder whose tensors are the model's own; nothing is traced, torch is not needed."""

from pathlib import Path

from spp_fx.checkpoint import ModelFolder
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import MANIFEST, read_manifest
from spp_fx.exporters.sparsity_config import sparsity_configs


def open_model(path: Path, *, weights: bool = True, any_config: bool = False) -> ModelFolder:
    """Open a model folder whose tensors are the model's own.

    Args:
        weights: whether it must hold any.
        any_config: take a folder of plain weights whose config.json has a sparsity_config, too.

    Raises:
        UsageError: an export in a form that transformers cannot load.
        FormatError: a file is damaged, or the weights are compressed.
    """
    if (path / MANIFEST).is_file() and (form := read_manifest(path).format) != "safetensors":
        raise UsageError(f"{path}: is an export ({form}); give the model folder that it was made from")
    folder = ModelFolder.open(path, weights=weights)
    _check_plain(folder, any_config)
    return folder


def _check_plain(folder: ModelFolder, any_config: bool) -> None:
    """FormatError if the weights are compressed-tensors', which transformers fills with random numbers."""
    packed = [name for name in folder.names if name.endswith((".bitmask", ".compressed"))]
    if packed:
        raise FormatError(
            f"{folder.path}: its weights are compressed (first: {packed[0]}); servers and transformers load "
            f"such a model with random weights. Write the plain folder with 'spp-fx unpack {folder.path}'"
        )
    if sparsity_configs(folder.config) and not any_config:
        raise FormatError(
            f"{folder.path}: config.json has a sparsity_config, which servers refuse or misread; "
            f"write the plain folder with 'spp-fx unpack {folder.path}'"
        )
