"""A Hugging Face model folder: its configuration, its weight files and everything that lies beside them.

The weights are those that transformers would load: every tensor of every shard that the index names. What the
index says of a single tensor does not count; where it is wrong, `ModelFolder.notes` says so.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.links import check_link, resolved
from spp_fx.storage.safetensors import BLOCK_BYTES, Shard, TensorInfo, read_header
from spp_fx.storage.strict_json import read_object, regular_file_size, shown

if TYPE_CHECKING:
    import torch


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_NAME_BYTES = 255
_ADAPTER_NAME = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Other frameworks' copies of the weights: stale as soon as ours change.
_FOREIGN = (".h5", ".msgpack", ".gguf", ".ot", ".onnx", ".onnx_data", ".onnx.data", ".nemo", ".tflite")
_NOT_TAKEN = (*_PICKLES, *_FOREIGN, ".safetensors", ".safetensors.index.json", ".bin.index.json")
OWN_FILES = ("adapter_config.json", "export.json", "sparsity.lock.json", "sparsity.provenance.json")
"""What spp-fx says of the folder it lies in; a changed copy of the folder must not take it along."""

_NOT_TAKEN_NAMES = frozenset({".DS_Store", "Thumbs.db", "adapter_config.json"})
_MAX_LINKED_FOLDERS = 1000  # links to folders of links multiply


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        names: sorted, as transformers reads them.
        index: the index file that named them, if any; `weight_map` and `metadata` as it has them.
    """

    names: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None
    metadata: object = None


def within(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`; the name comes from a file that is not trusted.

    Raises:
        FormatError: an absolute path, a '..', a backslash, a name that no file can have, or a link that leads
            where it may not; see `check_link`.
    """
    parts = PurePosixPath(name).parts
    if any(len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES for part in parts) or not _is_text(
        name
    ):
        raise FormatError(f"{folder}: {shown(name)} is no name that a file can have; it is refused")
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        raise FormatError(f"{folder}: the file name {shown(name)} leads out of the folder; it is refused")
    path = folder.joinpath(*parts)
    check_link(folder, path)
    return path


def _is_text(name: str) -> bool:
    """Whether a name has no lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def find_weights(folder: Path, explicit: object = None) -> WeightFiles:
    """The weight files of a model folder, chosen as transformers chooses them.

    Args:
        folder: an existing folder.
        explicit: `transformers_weights` of its config.json: the weight or index file to take.

    Raises:
        UsageError: there are no weights, or only pickled ones.
        FormatError: several candidates, a bad index, a missing shard, a name that leads out of the folder.
    """
    if explicit is not None:
        if not isinstance(explicit, str) or not explicit.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            raise FormatError(
                f"{folder}/config.json: transformers_weights is {shown(explicit)}, not a weight file"
            )
        within(folder, explicit)
        return (
            _from_index(folder, explicit)
            if explicit.endswith(".json")
            else WeightFiles((PurePosixPath(explicit).as_posix(),))
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
            f"{folder}: holds pickled weights only ({pickles[0]}), which can run code when opened; "
            "convert them where you trust them, with transformers: "
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


def ignored_weights(folder: Path, files: WeightFiles) -> tuple[str, ...]:
    """The .safetensors files at the top of a folder, sorted, that are not among its weights; an adapter's left out."""
    known = {*files.names, _ADAPTER_NAME}
    return tuple(
        path.name for path in _listed(folder) if path.name.endswith(".safetensors") and path.name not in known
    )


def other_files(folder: Path) -> tuple[Path, ...]:
    """Relative paths, sorted, of the files a copy of the model takes along beside its weights.

    Left out: every .safetensors and index, pickles, other frameworks' weights (they would be stale), the
    configuration of an adapter that lies beside the model, hidden folders (.git, .cache), __pycache__, folders
    that spp-fx or PEFT wrote (outputs made within the model's folder), and what desktop systems leave behind.

    Raises:
        FormatError: a link that leads where it may not (see `check_link`), to no file, or to a folder that it
            lies in; a pipe or device.
    """
    found: list[Path] = []
    links = 0
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(folder, ())]  # folders, each with the real ones above it
    while waiting:
        here, above = waiting.pop()
        if (real := resolved(here)) in above:
            raise FormatError(
                f"{here}: leads back to a folder that it lies in (a link in a circle); remove it"
            )
        for path in _listed(here):
            if path.is_dir():
                if not _is_taken(path):
                    continue
                check_link(folder, path)
                links += path.is_symlink()
                if links > _MAX_LINKED_FOLDERS:
                    raise FormatError(f"{folder}: holds more than {_MAX_LINKED_FOLDERS} links to folders")
                waiting.append((path, (*above, real)))
            elif path.name not in _NOT_TAKEN_NAMES and not path.name.endswith(_NOT_TAKEN):
                check_link(folder, path)
                if not path.is_file():
                    raise FormatError(f"{path}: is not a regular file (a dangling link, a pipe?); remove it")
                found.append(path.relative_to(folder))
    return tuple(sorted(found))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SppFxError(f"{folder}: cannot be listed ({error.strerror})") from error


def _is_taken(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return False
    return not any((folder / name).is_file() for name in OWN_FILES)


_CONFIG = "adapter_config.json"
_OURS = frozenset(
    ("format_version", "spp_fx_version", "base_model_fingerprint", "method_parameters", "sites")
)
"""Keys that spp-fx writes and PEFT does not know."""

_NAMES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "XLORA": "X-LoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "HIRA": "HiRA",
    "MISS": "MiSS",
    "ROAD": "RoAd",
    "DELORA": "DeLoRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "LN_TUNING": "LayerNorm tuning",
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
}
"""How `peft_type` is written in prose; others are shown as they are."""

_PROMPTS = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
)
"""Kinds that put something before the input, and have no `merge_and_unload`."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT.

    Attributes:
        folder: where its adapter_config.json lies.
        peft_type: as PEFT writes it: LORA, IA3, PROMPT_TUNING, ...
        base: the base model that it names, or None.
    """

    folder: Path
    peft_type: str
    base: str | None

    @property
    def what(self) -> str:
        """'a LoRA adapter of PEFT'."""
        name = _NAMES.get(self.peft_type) or shown(self.peft_type).strip("'\"")
        return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name} adapter of PEFT"

    @property
    def refusal(self) -> str:
        """Why nothing can be done with it as it is, and what can be."""
        of = f" (of the base model {shown(self.base)})" if self.base else ""
        where = f"{self.folder}: this is {self.what}{of}, not a model and not an adapter of spp-fx: "
        if self.peft_type in _PROMPTS:
            return f"{where}it leaves every weight of its base as it is, so use spp-fx on the base model's folder"
        return (
            f"{where}spp-fx cannot judge it without its base; merge it into the model with peft first "
            "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(MERGED)), "
            "then verify the merged folder"
        )

    @property
    def note(self) -> str:
        """What to know of a model that it lies beside."""
        return (
            f"{self.folder / _CONFIG}: {self.what} lies beside the model and is left out: only the model's own "
            "weights are looked at or written; transformers loads it on top of them where peft is installed"
        )


def peft_adapter(folder: Path) -> PeftAdapter | None:
    """The adapter of PEFT in a folder; None where there is none, it is spp-fx's own, or nobody can tell."""
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = read_object(path)
    except FormatError:
        return None  # whoever takes it for an adapter of spp-fx says what is wrong with it
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(kind, str) or not kind or _OURS & config.keys():
        return None
    return PeftAdapter(folder, kind, base if isinstance(base, str) and base else None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter folder; a model folder with an adapter of PEFT in it is not one."""
    return (folder / _CONFIG).is_file() and not (
        (folder / "config.json").is_file() and peft_adapter(folder) is not None
    )


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


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")


def resolve_model(name: str) -> Path:
    """A model's folder: the path itself if it is there, else the hub's model of that id.

    Raises:
        UsageError: it is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: there is no such folder")
    # It takes a third of a second to import, which a local folder need not wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{name}: there is no such folder, and as a hub id it cannot be had: {said}"
        ) from error
