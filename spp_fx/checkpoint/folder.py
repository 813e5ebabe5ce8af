"""A Hugging Face model folder: its configuration, its weight files and everything that lies beside them.

The weights are those that transformers would load: every tensor of every shard that the index names. What the
index says of a single tensor does not count; where it is wrong, `ModelFolder.notes` says so.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spp_fx.checkpoint.header import TensorInfo, read_header, regular_file_size
from spp_fx.checkpoint.layout import WeightFiles, find_weights, ignored_weights, other_files, within
from spp_fx.checkpoint.peft import peft_adapter
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
        notes: what is odd about the folder and does not change the model, one line each, for the reader.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    index: str | None
    notes: tuple[str, ...] = field(repr=False)
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
            UsageError: not a folder, no config.json, no weights, pickled weights only, an adapter.
            FormatError: a damaged config, index or header; a shard that is missing or lies where links may
                not lead (see `links.check_link`); a tensor that is stored twice and not the same.
        """
        path = Path(path)
        if not path.is_dir():
            reason = "is not a folder" if path.exists() else "there is no such folder"
            raise UsageError(f"{path}: {reason}; give the folder of a Hugging Face model")
        config = _read_config(path)
        adapter = peft_adapter(path)
        notes = [adapter.note] if adapter is not None else []
        if not weights:
            return cls(path, config, (), None, tuple(notes), {})
        try:
            files = find_weights(path, config.get("transformers_weights"))
        except UsageError as error:
            raise error if adapter is None else UsageError(adapter.refusal) from error
        shards = tuple(Shard.open(within(path, name), name) for name in files.names)
        places = _places(shards)
        _check_copies(path, places)
        notes += [*_about_shards(path, files, shards, places), *_about_index(path, files, shards, places)]
        # transformers reads the shards in the order of their names: the last one that holds a tensor counts.
        return cls(path, config, shards, files.index, tuple(notes), {n: at[-1] for n, at in places.items()})

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
        if (adapter := peft_adapter(folder)) is not None:
            raise UsageError(adapter.refusal)
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


def _places(shards: tuple[Shard, ...]) -> dict[str, list[Shard]]:
    """The shards that hold each tensor, in their order."""
    places: dict[str, list[Shard]] = {}
    for shard in shards:
        for name in shard.header.tensors:
            places.setdefault(name, []).append(shard)
    return places


def _check_copies(folder: Path, places: dict[str, list[Shard]]) -> None:
    """FormatError where two shards hold a tensor of one name that is not the same in both."""
    for name, (first, *others) in places.items():
        for other in others:
            if difference := first.difference(other, name):
                raise FormatError(
                    f"{folder}: tensor {shown(name)} is stored twice, in {first.name} and {other.name}, with "
                    f"{difference}, so it is unclear which one is the model's (transformers takes that of "
                    f"{places[name][-1].name}); remove the wrong one, or write the model again"
                )


def _about_shards(
    folder: Path, files: WeightFiles, shards: tuple[Shard, ...], places: dict[str, list[Shard]]
) -> Iterator[str]:
    """What is odd about the weight files."""
    if copies := [name for name, held in places.items() if len(held) > 1]:
        held = " and ".join(shard.name for shard in places[copies[0]])
        yield (
            f"{folder}: {_counted(copies, 'tensor is', 'tensors are')} stored in more than one shard, in equal bytes "
            f"(first: {shown(copies[0])} in {held}); a copy counts for nothing by itself"
        )
    if bare := [shard.name for shard in shards if "format" not in shard.header.metadata]:
        yield (
            f"{folder}: {_counted(bare, 'weight file has', 'weight files have')} no format in the metadata "
            f"(first: {shown(bare[0])}); transformers 5 does not ask for it, older ones do"
        )
    if ignored := [name for name in ignored_weights(folder, files) if _may_hold_tensors(folder / name)]:
        which = f"{files.index} does not name" if files.index else f"{files.names[0]} is all it loads, not"
        yield (
            f"{folder}: {_counted(ignored, 'weight file is', 'weight files are')} left out, as transformers does: "
            f"{which} {shown(ignored[0])}{', ...' if len(ignored) > 1 else ''}"
        )


def _about_index(
    folder: Path, files: WeightFiles, shards: tuple[Shard, ...], places: dict[str, list[Shard]]
) -> Iterator[str]:
    """Where the index and the shards disagree: the shards are what transformers loads."""
    if files.index is None or files.weight_map is None:
        return
    index, named = folder / files.index, files.weight_map
    if unnamed := [name for name in places if name not in named]:
        yield (
            f"{index}: does not name {_counted(unnamed, 'tensor', 'tensors')} of its shards (first: "
            f"{shown(unnamed[0])} in {places[unnamed[0]][0].name}); taken as the model's, as transformers does"
        )
    if absent := [name for name in named if name not in places]:
        yield (
            f"{index}: names {_counted(absent, 'tensor', 'tensors')} that no shard holds (first: "
            f"{shown(absent[0])} in {shown(named[absent[0]])}); only what the shards hold is loaded"
        )
    wrong = [
        name
        for name, shard in named.items()
        if name in places and Path(shard).as_posix() not in [held.name for held in places[name]]
    ]
    if wrong:
        yield (
            f"{index}: places {_counted(wrong, 'tensor', 'tensors')} in the wrong shard (first: {shown(wrong[0])} in "
            f"{shown(named[wrong[0]])}, which {places[wrong[0]][0].name} holds); read from where it is"
        )
    if not isinstance(files.metadata, dict):
        yield f'{index}: has no metadata, without which transformers cannot load the folder; add "metadata": {{}}'
        return
    sizes = {name: held[0].info(name).nbytes for name, held in places.items()}
    stored = sum(sizes[name] * len(held) for name, held in places.items())
    total = cast("dict[str, object]", files.metadata).get("total_size", stored)
    if total not in (stored, sum(sizes.values()), sum(sizes.get(name, 0) for name in named)):
        yield f"{index}: total_size is {shown(total)}, its shards hold {stored} bytes of tensors; nobody reads it"


def _counted(names: list[str], one: str, more: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else more}"


def _may_hold_tensors(path: Path) -> bool:
    try:
        return bool(read_header(path).tensors)
    except SppFxError:  # nobody reads it: whatever is wrong with it is not the model's
        return True
