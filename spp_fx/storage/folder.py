"""A Hugging Face model folder: its configuration, its weight files and the files beside them.

The weights are those that transformers would load: every tensor of every shard that the index names. Where the index
is wrong about a single tensor, the shards count, and `ModelFolder.notes` says so.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.links import check_link, resolved
from spp_fx.storage.safetensors import BLOCK_BYTES, Shard, TensorInfo, read_header
from spp_fx.storage.strict_json import MAX_JSON_BYTES, is_unicode, read_object, regular_file_size, shown

if TYPE_CHECKING:
    import torch


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_NAME_BYTES = 255
_ADAPTER_NAME = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Weights of other frameworks: stale as soon as ours change.
_FOREIGN = (".h5", ".msgpack", ".gguf", ".ot", ".onnx", ".onnx_data", ".onnx.data", ".nemo", ".tflite")
_NOT_TAKEN = (*_PICKLES, *_FOREIGN, ".safetensors", ".safetensors.index.json", ".bin.index.json")
OWN_FILES = ("adapter_config.json", "export.json", "sparsity.lock.json", "sparsity.provenance.json")
"""What spp-fx records about a folder; a changed copy of the folder must not have it."""

_NOT_TAKEN_NAMES = frozenset({".DS_Store", "Thumbs.db", "adapter_config.json"})
_MAX_LINKED_FOLDERS = 1000  # links to folders of links multiply


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        names: sorted, as transformers reads them.
        index: name of the index file that lists them, or None; `weight_map` and `metadata` are its contents.
    """

    names: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None
    metadata: object = None


def within(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`; the name comes from a file that is not trusted.

    Raises:
        FormatError: an absolute path, a '..', a backslash, a name that no file can have, or a link that leads
            elsewhere; see `check_link`.
    """
    parts = PurePosixPath(name).parts
    if not is_unicode(name) or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        raise FormatError(f"{folder}: {shown(name)} is not a valid file name")
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        raise FormatError(f"{folder}: the file name {shown(name)} leads out of the folder")
    path = folder.joinpath(*parts)
    check_link(folder, path)
    return path


def find_weights(folder: Path, explicit: object = None) -> WeightFiles:
    """The weight files of a model folder, chosen as transformers chooses them.

    Args:
        folder: an existing folder.
        explicit: `transformers_weights` of its config.json: the weight or index file to take.

    Raises:
        UsageError: there are no weights, or only pickled ones.
        FormatError: several candidates, a bad index, a missing shard, a name that leads out of the folder.
    """
    if isinstance(explicit, str) and explicit.endswith(".safetensors.index.json"):
        return _from_index(folder, explicit)
    if isinstance(explicit, str) and explicit.endswith(".safetensors"):
        within(folder, explicit)
        return WeightFiles((PurePosixPath(explicit).as_posix(),))
    if explicit is not None:
        raise FormatError(
            f"{folder}/config.json: transformers_weights is {shown(explicit)}, not a weight file"
        )
    if (folder / WEIGHTS_NAME).is_file():
        return WeightFiles((WEIGHTS_NAME,))
    if (folder / INDEX_NAME).is_file():
        return _from_index(folder, INDEX_NAME)
    names = sorted(entry.name for entry in folder.iterdir())
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if name in names:
            raise FormatError(f"{folder / name}: is not a file (a dangling link?); get it again")
    found = [name for name in names if name.endswith(".safetensors") and name != _ADAPTER_NAME]
    if len(found) == 1:
        return WeightFiles((found[0],))
    if found:
        raise FormatError(
            f"{folder}: holds {len(found)} .safetensors files ({shown(found)}) but no {INDEX_NAME}, "
            "so it is unknown which belong to the model; get the index as well"
        )
    raise UsageError(_no_weights(folder, names))


def _no_weights(folder: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith((*_PICKLES, ".bin.index.json"))]
    pickles = [name for name in pickles if name.startswith(("pytorch_model", "consolidated", "model"))]
    if pickles:
        return (
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when opened; "
            "if you trust them, convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    return f"{folder}: holds no weights; it needs {WEIGHTS_NAME}, or {INDEX_NAME} and its shards"


def _from_index(folder: Path, name: str) -> WeightFiles:
    path = within(folder, name)
    content = read_object(path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map of tensor names to files; get it again")
    for tensor, shard in cast("dict[str, object]", weight_map).items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise FormatError(
                f"{path}: places tensor {shown(tensor)} in {shown(shard)}, not a .safetensors file"
            )
    checked = cast("dict[str, str]", weight_map)
    shards = sorted(set(checked.values()))
    missing = [shard for shard in shards if not within(folder, shard).is_file()]
    if missing:
        raise FormatError(
            f"{path}: names {len(missing)} of {len(shards)} shards that are not in the folder: "
            f"{', '.join(shown(shard) for shard in missing[:5])}{', ...' if len(missing) > 5 else ''}; "
            "get them too"
        )
    names = tuple(sorted({Path(shard).as_posix() for shard in shards}))
    return WeightFiles(names, name, checked, content.get("metadata"))


_ADAPTER_CONFIG = "adapter_config.json"
_OURS = frozenset(
    ("format_version", "spp_fx_version", "base_model_fingerprint", "method_parameters", "sites")
)
"""Keys that spp-fx writes and PEFT does not know."""

_PROMPTS = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
)
"""Types that put something before the input, and have no `merge_and_unload`."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT.

    Attributes:
        folder: where its adapter_config.json is.
        peft_type: as PEFT writes it: LORA, IA3, PROMPT_TUNING, ...
        base: the base model that it names, or None.
    """

    folder: Path
    peft_type: str
    base: str | None

    @property
    def what(self) -> str:
        """'a PEFT adapter (LORA)'."""
        return f"a PEFT adapter ({shown(self.peft_type)[1:-1]})"

    @property
    def refusal(self) -> str:
        """Why spp-fx does not read it, and what to do."""
        of = f" for the base model {shown(self.base)}" if self.base else ""
        reason = f"{self.folder}: is {self.what}{of}, not a model and not an adapter of spp-fx. "
        if self.peft_type in _PROMPTS:
            return (
                f"{reason}It does not change the weights of its base: use spp-fx on the base model's folder"
            )
        return (
            f"{reason}Merge it into its base with peft "
            "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(MERGED)), "
            "then use spp-fx on the merged folder"
        )

    @property
    def note(self) -> str:
        """What to know about a model that has it in its folder."""
        return (
            f"{self.folder / _ADAPTER_CONFIG}: {self.what} is in the model's folder; it is left out. "
            "transformers loads it on top of the model where peft is installed"
        )


def peft_adapter(folder: Path) -> PeftAdapter | None:
    """The adapter of PEFT in a folder; None if there is none, if it is spp-fx's own, or if it cannot be read."""
    path = folder / _ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = read_object(path)
    except FormatError:
        return None  # the reader of spp-fx's adapters reports what is wrong
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(kind, str) or not kind or _OURS & config.keys():
        return None
    return PeftAdapter(folder, kind, base if isinstance(base, str) and base else None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter folder; a model folder with an adapter of PEFT in it is not one."""
    return (folder / _ADAPTER_CONFIG).is_file() and not (
        (folder / "config.json").is_file() and peft_adapter(folder) is not None
    )


_SAMPLE_BYTES = 4096
_SAMPLES = 16


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose headers have been read and checked; weights are read on demand.

    Attributes:
        path: the folder, as given.
        config: config.json.
        shards: the weight files, by name; empty when opened with `weights=False`.
        index: name of the index file that lists the shards, or None.
        notes: what is odd about the folder but does not change the model, one line each.
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
            path: a local folder, for example a snapshot in the Hugging Face cache.
            weights: False to read only config.json.

        Raises:
            UsageError: not a folder, no config.json, no weights, pickled weights only, an adapter.
            FormatError: a damaged config, index or header; a shard that is missing or behind a link that leads
                elsewhere (see `links.check_link`); two different tensors of one name.
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
        # transformers reads the shards in the order of their names: the last copy of a tensor counts.
        return cls(path, config, shards, files.index, tuple(notes), {n: at[-1] for n, at in places.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._where))

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of all tensors, without headers."""
        return sum(info.nbytes for shard in self.shards for info in shard.header.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def info(self, name: str) -> tuple[Shard, TensorInfo]:
        """The shard that holds a tensor, and its place in it; UsageError if there is none."""
        shard = self._where.get(name)
        if shard is None:
            raise UsageError(f"{self.path}: holds no tensor {shown(name)}")
        return shard, shard.info(name)

    def read(self, name: str) -> "torch.Tensor":
        """See `Shard.read`."""
        return self.info(name)[0].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """See `Shard.read_rows`."""
        return self.info(name)[0].read_rows(name, start, stop)

    def row_blocks(self, name: str, max_bytes: int = BLOCK_BYTES) -> "Iterator[torch.Tensor]":
        """See `Shard.row_blocks`."""
        return self.info(name)[0].row_blocks(name, max_bytes)

    def fingerprint(self) -> str:
        """Identity of the weights: BLAKE2b-256 in hexadecimal, fast however large the model is.

        It covers, shard by shard in the order of their names, the whole header and, of the data after it,
        the length, the first and the last 4 KiB and up to 16 blocks of 4 KiB spread evenly. It identifies a
        model; it does not prove that no byte differs.

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
        """Relative paths, sorted, of the files that a copy of the model has beside its weights.

        Left out: every .safetensors and index, pickles, weights of other frameworks (they would be stale), the
        configuration of an adapter, hidden folders (.git, .cache), __pycache__, folders that spp-fx or PEFT wrote
        within the model's folder, and files of desktop systems.

        Raises:
            FormatError: a link that leads elsewhere (see `check_link`), to no file, or to a folder that contains
                it; a pipe or device.
        """

        def fail(error: OSError) -> None:
            raise SppFxError(f"{error.filename}: cannot be listed ({error.strerror})") from error

        found: list[Path] = []
        links = 0
        for parent, folders, files in os.walk(self.path, onerror=fail, followlinks=True):
            here = Path(parent)
            folders[:] = [name for name in folders if _is_copied(here / name)]
            for path in (here / name for name in folders):
                if path.is_symlink():
                    check_link(self.path, path)
                    if resolved(here).is_relative_to(resolved(path)):
                        raise FormatError(f"{path}: is a link to a folder that contains it; remove it")
                    links += 1
            if links > _MAX_LINKED_FOLDERS:
                raise FormatError(f"{self.path}: holds more than {_MAX_LINKED_FOLDERS} links to folders")
            for path in (here / name for name in files):
                if path.name not in _NOT_TAKEN_NAMES and not path.name.endswith(_NOT_TAKEN):
                    check_link(self.path, path)
                    if not path.is_file():
                        raise FormatError(
                            f"{path}: is not a regular file (a dangling link, a pipe?); remove it"
                        )
                    found.append(path.relative_to(self.path))
        return tuple(sorted(found))


def _is_copied(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return False
    return not any((folder / name).is_file() for name in OWN_FILES)


def _sample_offsets(start: int, end: int) -> list[int]:
    """Where sampled blocks begin: every block of a small region; first, last and 16 between of a large one."""
    if end - start <= (_SAMPLES + 2) * _SAMPLE_BYTES:
        return list(range(start, end, _SAMPLE_BYTES))
    last = end - _SAMPLE_BYTES
    return [start + (last - start) * i // (_SAMPLES + 1) for i in range(_SAMPLES + 2)]


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if (adapter := peft_adapter(folder)) is not None:
            raise UsageError(adapter.refusal)
        if (folder / _ADAPTER_CONFIG).exists():
            raise UsageError(
                f"{folder}: is an adapter folder; give its base model, or the folder that 'spp-fx merge' writes"
            )
        raise UsageError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
    path = within(folder, "config.json")
    if regular_file_size(path) > MAX_JSON_BYTES:
        raise FormatError(f"{path}: is larger than {MAX_JSON_BYTES} bytes; get it again")
    try:  # as lenient as transformers: Infinity and repeated keys occur in published configs
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); get it again") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: holds {shown(config)}, expected a JSON object")
    return cast("dict[str, Any]", config)


def _places(shards: tuple[Shard, ...]) -> dict[str, list[Shard]]:
    """The shards that hold each tensor, in order."""
    places: dict[str, list[Shard]] = {}
    for shard in shards:
        for name in shard.header.tensors:
            places.setdefault(name, []).append(shard)
    return places


def _check_copies(folder: Path, places: dict[str, list[Shard]]) -> None:
    """FormatError if two shards hold different tensors of one name."""
    for name, (first, *others) in places.items():
        for other in others:
            if difference := first.difference(other, name):
                raise FormatError(
                    f"{folder}: tensor {shown(name)} is stored twice, in {first.name} and {other.name}, with "
                    f"{difference} (transformers loads that of {places[name][-1].name}); remove the wrong one, or "
                    "write the model again"
                )


def _about_shards(
    folder: Path, files: WeightFiles, shards: tuple[Shard, ...], places: dict[str, list[Shard]]
) -> Iterator[str]:
    """What is odd about the weight files."""
    if copies := [name for name, held in places.items() if len(held) > 1]:
        held = " and ".join(shard.name for shard in places[copies[0]])
        yield (
            f"{folder}: {_counted(copies, 'tensor is', 'tensors are')} stored in more than one shard, in equal bytes "
            f"(first: {shown(copies[0])} in {held}); each counts once"
        )
    if bare := [shard.name for shard in shards if "format" not in shard.header.metadata]:
        yield (
            f"{folder}: {_counted(bare, 'weight file has', 'weight files have')} no format in the metadata "
            f"(first: {shown(bare[0])}); transformers before version 5 does not load them"
        )
    known = {*files.names, _ADAPTER_NAME}
    others = [path for path in sorted(folder.glob("*.safetensors")) if path.name not in known]
    if ignored := [path.name for path in others if _may_hold_tensors(path)]:
        why = f"not in {files.index}" if files.index else f"{files.names[0]} holds the model"
        yield (
            f"{folder}: {_counted(ignored, 'weight file is', 'weight files are')} left out, as in transformers "
            f"({why}): {shown(ignored[0])}{', ...' if len(ignored) > 1 else ''}"
        )


def _about_index(
    folder: Path, files: WeightFiles, shards: tuple[Shard, ...], places: dict[str, list[Shard]]
) -> Iterator[str]:
    """Where the index disagrees with the shards, which are what transformers loads."""
    if files.index is None or files.weight_map is None:
        return
    index, named = folder / files.index, files.weight_map
    if unnamed := [name for name in places if name not in named]:
        yield (
            f"{index}: does not name {_counted(unnamed, 'tensor', 'tensors')} of its shards (first: "
            f"{shown(unnamed[0])} in {places[unnamed[0]][0].name}); loaded nevertheless, as in transformers"
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
            f"{shown(named[wrong[0]])}, which {places[wrong[0]][0].name} holds); read from there"
        )
    if not isinstance(files.metadata, dict):
        yield f'{index}: has no metadata, which transformers needs to load the folder; add "metadata": {{}}'
        return
    sizes = {name: held[0].info(name).nbytes for name, held in places.items()}
    stored = sum(sizes[name] * len(held) for name, held in places.items())
    total = cast("dict[str, object]", files.metadata).get("total_size", stored)
    if total not in (stored, sum(sizes.values()), sum(sizes.get(name, 0) for name in named)):
        yield f"{index}: total_size is {shown(total)}, its shards hold {stored} bytes of tensors; it is not used"


def _counted(names: list[str], one: str, more: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else more}"


def _may_hold_tensors(path: Path) -> bool:
    try:
        return bool(read_header(path).tensors)
    except SppFxError:  # a damaged file that is not the model's is not an error
        return True


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")


def resolve_model(name: str) -> Path:
    """The folder `name` if it exists, else the snapshot of the hub's model of that id; UsageError if neither."""
    path = Path(name)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: there is no such folder")
    # Imported here: it takes a third of a second, and local folders do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{name}: there is no such folder, and it cannot be downloaded from the hub: {said}"
        ) from error
