"""Which files of a model folder are its weights, which are taken along, and which lie outside of it."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from spp_fx.checkpoint.json_file import read_object
from spp_fx.checkpoint.links import check_link, resolved
from spp_fx.checkpoint.strict_json import shown
from spp_fx.errors import FormatError, SppFxError, UsageError

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
