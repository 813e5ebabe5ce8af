"""compressed-tensors' dropped format sparse-24-bitmask, and the sparsity_config of a config.json.

Up to compressed-tensors 0.14 a 2:4 weight `L.weight` of shape (m, k) could be stored as

| tensor       | shape          | dtype        | what                                                         |
|--------------|----------------|--------------|--------------------------------------------------------------|
| L.shape      | [2, 1] or [2]  | int64        | m, k                                                         |
| L.compressed | [m, k/2]       | the weight's | two entries of each four, row-major; some may be zeros       |
| L.bitmask    | [m, ceil(k/8)] | uint8        | their positions, row by row, LSB first                       |

Later releases dropped the decoder. transformers does not find the model's names in such a file, fills the weights with
random numbers and shows a warning at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_fx.errors import FormatError
from spp_fx.storage.folder import ModelFolder

if TYPE_CHECKING:
    from torch import Tensor

SPARSE_24 = "sparse-24-bitmask"
PARTS = ("compressed", "bitmask", "shape")
_NESTED = ("quantization_config", "compression_config")
"""Objects of config.json that may hold a sparsity_config, beside config.json itself."""


def sparsity_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every sparsity_config of a config.json, by its key."""
    found = {"sparsity_config": config["sparsity_config"]} if config.get("sparsity_config") else {}
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, dict) and nested.get("sparsity_config"):
            found[f"{key}.sparsity_config"] = nested["sparsity_config"]
    return found


def without_sparsity(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json without any sparsity_config, and the keys that were removed.

    A quantization_config of compressed-tensors that then quantizes nothing is removed too: a reader would expect
    quantized weights.
    """
    plain, removed = dict(config), list(sparsity_configs(config))
    plain.pop("sparsity_config", None)
    for key in _NESTED:
        nested = config.get(key)
        if not isinstance(nested, dict) or "sparsity_config" not in nested:
            continue
        rest = {name: value for name, value in nested.items() if name != "sparsity_config"}
        quantizes = rest.get("config_groups") or rest.get("kv_cache_scheme")
        if quantizes or rest.get("quant_method", "compressed-tensors") != "compressed-tensors":
            plain[key] = rest
        else:
            del plain[key]
            removed.append(f"{key}, which says nothing else")
    return plain, removed


def is_legacy(folder: ModelFolder) -> bool:
    """Whether a folder holds compressed weights, or its config.json has a sparsity_config."""
    return bool(compressed_layers(folder)) or bool(sparsity_configs(folder.config))


def compressed_layers(folder: ModelFolder) -> list[str]:
    """The names L of compressed weights in a folder, sorted."""
    suffixes = (".compressed", ".bitmask")
    return sorted({name.rpartition(".")[0] for name in folder.names if name.endswith(suffixes)})


@dataclass(frozen=True)
class LegacyFolder:
    """The tensors of a legacy folder under the model's names.

    Attributes:
        folder: the folder.
        shapes: of every tensor of the model.
        dtypes: the same, as safetensors spells them.
        packed: the weights that are compressed.
    """

    folder: ModelFolder
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    packed: frozenset[str]

    @classmethod
    def open(cls, folder: ModelFolder) -> "LegacyFolder":
        """Check the parts of every compressed weight; none is decoded.

        Raises:
            FormatError: a part is missing or of a wrong shape; names the file and the tensor.
        """
        shapes = {name: folder.info(name)[1].shape for name in folder.names}
        dtypes = {name: folder.info(name)[1].dtype for name in folder.names}
        compressed = compressed_layers(folder)
        for layer in compressed:
            shape, dtype = _check_parts(folder, layer)
            for part in PARTS:
                del shapes[f"{layer}.{part}"], dtypes[f"{layer}.{part}"]
            shapes[f"{layer}.weight"], dtypes[f"{layer}.weight"] = shape, dtype
        return cls(folder, shapes, dtypes, frozenset(f"{layer}.weight" for layer in compressed))

    def file(self, name: str) -> str:
        """The file that holds a tensor of the model, or the values of a compressed one."""
        stored = f"{name.removesuffix('.weight')}.compressed" if name in self.packed else name
        return self.folder.info(stored)[0].name

    def read(self, name: str) -> "Tensor":
        """A tensor as the model has it.

        Raises:
            FormatError: values and bitmask do not belong together; names the file, the tensor and the row.
        """
        import torch

        if name not in self.packed:
            return self.folder.read(name)
        layer = name.removesuffix(".weight")
        m, k = self.shapes[name]
        values, bits = (self.folder.read(f"{layer}.{part}") for part in ("compressed", "bitmask"))
        where = f"{self.folder.info(f'{layer}.bitmask')[0].path}: {layer}.bitmask"
        every = np.unpackbits(bits.numpy(), axis=1, bitorder="little").view(np.bool_)
        kept, padding = every[:, :k].reshape(-1), every[:, k:]
        if padding.any():
            row = int(padding.any(axis=1).argmax())
            raise FormatError(f"{where}: row {row} has bits set past its last column {k - 1}")
        counts = np.bitwise_count(np.packbits(kept.reshape(-1, 4), axis=1)).reshape(-1)
        if (counts != 2).any():
            first = int((counts != 2).argmax())
            row, column = divmod(4 * first, k)
            raise FormatError(
                f"{where}: row {row}, columns {column}-{column + 3} keep {int(counts[first])} entries, "
                "the format keeps two of every four"
            )
        kind = np.dtype(f"<u{values.element_size()}")
        weight = np.zeros(m * k, dtype=kind)
        weight[kept] = values.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind)
        return torch.from_numpy(weight).view(values.dtype).reshape(m, k)

    def problem(self) -> str:
        """Why the folder should not be released, and how to fix it."""
        fix = f"write the plain folder with 'spp-fx unpack {self.folder.path}'"
        if not self.packed:
            keys = " and ".join(sparsity_configs(self.folder.config))
            return f"config.json has a {keys}, but the weights are plain: servers refuse or misread it; {fix}"
        return (
            f"{len(self.packed)} weights are compressed in the dropped format {SPARSE_24}: transformers 5 with "
            f"compressed-tensors 0.20 loads random weights in their place, without an error; {fix}"
        )


def _check_parts(folder: ModelFolder, layer: str) -> tuple[tuple[int, int], str]:
    """Shape and dtype of a compressed weight."""
    for part in PARTS:
        if f"{layer}.{part}" not in folder:
            raise FormatError(
                f"{folder.path}: {layer}.{part}: is missing, so the compressed {layer}.weight cannot be decoded; "
                "transformers would load random weights in its place. Get the folder again"
            )
    if f"{layer}.weight" in folder:
        raise FormatError(f"{folder.path}: {layer}.weight: is stored twice, compressed and plain")
    shard, size = folder.info(f"{layer}.shape")
    where = f"{shard.path}: {layer}.shape"
    if size.dtype != "I64" or size.shape not in ((2,), (2, 1)):
        raise FormatError(f"{where}: is {size.dtype} {list(size.shape)}, expected two of I64")
    m, k = (int(value) for value in folder.read(f"{layer}.shape").reshape(-1))
    if m <= 0 or k <= 0 or k % 4:
        raise FormatError(f"{where}: says {m} x {k}, expected rows of whole groups of four")
    values = folder.info(f"{layer}.compressed")[1]
    for part, dtype, shape in (("compressed", values.dtype, (m, k // 2)), ("bitmask", "U8", (m, -(-k // 8)))):
        shard, found = folder.info(f"{layer}.{part}")
        if (found.dtype, found.shape) != (dtype, shape):
            raise FormatError(
                f"{shard.path}: {layer}.{part}: is {found.dtype} {list(found.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
    return (m, k), values.dtype
