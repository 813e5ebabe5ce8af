"""A Hugging Face model folder: its configuration, its weight files and everything that lies beside them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spp_fx.checkpoint.header import TensorInfo, regular_file_size
from spp_fx.checkpoint.layout import INDEX_NAME, WeightFiles, find_weights, other_files, within
from spp_fx.checkpoint.shard import BLOCK_BYTES, Shard
from spp_fx.checkpoint.strict_json import shown
from spp_fx.errors import FormatError, SppFxError, UsageError

if TYPE_CHECKING:
    import torch

_MAX_CONFIG_BYTES = 100_000_000
_SAMPLE_BYTES = 4096
_SAMPLES = 16


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose headers have been read and checked; weights are read only when asked for.

    Attributes:
        path: the folder, as given.
        config: config.json.
        shards: the weight files, by name; empty when opened with `weights=False`.
        index: name of the index file the shards were found through, or None.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    index: str | None
    _where: dict[str, Shard] = field(repr=False)

    @classmethod
    def open(cls, path: Path, weights: bool = True) -> "ModelFolder":
        """Open a folder and check every header in it.

        As in transformers, `transformers_weights` in config.json comes first, then model.safetensors,
        then model.safetensors.index.json; a single other *.safetensors file is taken as the weights.

        Args:
            path: a local folder; a snapshot folder of the Hugging Face cache is one.
            weights: False to read config.json alone, for work that needs no weights.

        Raises:
            UsageError: not a folder, no config.json, no weights, pickled weights only.
            FormatError: a damaged config, index or header; a shard that is missing or lies outside of
                the folder; an index and shards that disagree; a tensor stored twice.
        """
        path = Path(path)
        if not path.is_dir():
            reason = "is not a folder" if path.exists() else "there is no such folder"
            raise UsageError(f"{path}: {reason}; give the folder of a Hugging Face model")
        config = _read_config(path)
        if not weights:
            return cls(path, config, (), None, {})
        files = find_weights(path, config.get("transformers_weights"))
        shards = tuple(Shard.open(within(path, name), name) for name in files.names)
        where = _locate(path, shards)
        if files.weight_map is not None:
            _check_index(path, files, where)
        return cls(path, config, shards, files.index, where)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._where))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as stored, headers left out."""
        return sum(info.nbytes for shard in self.shards for info in shard.header.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def info(self, name: str) -> tuple[Shard, TensorInfo]:
        """The shard that holds a tensor, and where.

        Raises:
            UsageError: no shard holds it.
        """
        shard = self._where.get(name)
        if shard is None:
            raise UsageError(f"{self.path}: holds no tensor {shown(name)}")
        return shard, shard.info(name)

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor in memory of its own; see `Shard.read`."""
        return self.info(name)[0].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows start <= i < stop along the first dimension; see `Shard.read_rows`."""
        return self.info(name)[0].read_rows(name, start, stop)

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> "Iterator[torch.Tensor]":
        """Consecutive blocks of rows of at most `max_bytes` bytes; see `Shard.row_blocks`."""
        return self.info(name)[0].row_blocks(name, max_bytes)

    def fingerprint(self) -> str:
        """Identity of the weights: BLAKE2b-256, 64 hexadecimal digits, cheap however large the model is.

        It covers, shard by shard in the order of their names, the whole header and, of the data after it,
        the length, the first and the last 4 KiB and up to 16 blocks of 4 KiB spread evenly. It tells one
        model from another; it does not prove that no byte differs.

        Raises:
            UsageError: the folder was opened without weights.
        """
        if not self.shards:
            raise UsageError(f"{self.path}: was opened without weights and has no fingerprint")
        digest = hashlib.blake2b(b"spp-fx fingerprint 1\0", digest_size=32)
        for shard in self.shards:
            start, end = shard.header.data_start, shard.header.data_end
            digest.update(start.to_bytes(8, "little"))
            digest.update(shard.header.raw)
            digest.update((end - start).to_bytes(8, "little"))
            try:
                with open(shard.path, "rb") as file:
                    for offset in _sample_offsets(start, end):
                        file.seek(offset)
                        digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
            except OSError as error:
                raise SppFxError(f"{shard.path}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def other_files(self) -> tuple[Path, ...]:
        """What a copy of the model takes along beside its weights; see `layout.other_files`."""
        return other_files(self.path)


def _sample_offsets(start: int, end: int) -> list[int]:
    """Where sampled blocks begin: all of a small region; first, last and 16 between of a large one."""
    if end - start <= (_SAMPLES + 2) * _SAMPLE_BYTES:
        return list(range(start, end, _SAMPLE_BYTES))
    last = end - _SAMPLE_BYTES
    return [start + (last - start) * i // (_SAMPLES + 1) for i in range(_SAMPLES + 2)]


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UsageError(
                f"{folder}: is an adapter folder; give its base model, or what 'spp-fx merge' makes of both"
            )
        raise UsageError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
    path = within(folder, "config.json")
    if regular_file_size(path) > _MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: is larger than {_MAX_CONFIG_BYTES} bytes; get the file again")
    try:  # as lenient as transformers: Infinity and repeated keys occur in published configs
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); get the file again") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: holds {shown(config)}, expected a JSON object")
    return cast("dict[str, Any]", config)


def _locate(folder: Path, shards: tuple[Shard, ...]) -> dict[str, Shard]:
    where: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in where:
                raise FormatError(
                    f"{folder}: tensor {shown(name)} is stored twice, "
                    f"in {where[name].name} and {shard.name}; write the model again"
                )
            where[name] = shard
    return where


def _check_index(folder: Path, files: WeightFiles, where: dict[str, Shard]) -> None:
    """The index and the shards name the same tensors at the same places."""
    index, weight_map = folder / (files.index or INDEX_NAME), files.weight_map or {}
    for name, shard_name in weight_map.items():
        if name not in where:
            raise FormatError(
                f"{index}: places tensor {shown(name)} in {shown(shard_name)}, which does not hold it; "
                "get both files again"
            )
        if where[name].name != Path(shard_name).as_posix():
            raise FormatError(
                f"{index}: places tensor {shown(name)} in {shown(shard_name)}, "
                f"but {where[name].name} holds it; get both files again"
            )
    for name, shard in where.items():
        if name not in weight_map:
            raise FormatError(
                f"{index}: does not name tensor {shown(name)}, which {shard.name} holds; get both files again"
            )
