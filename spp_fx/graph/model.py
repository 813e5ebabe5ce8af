"""Load the model of a folder: with weights, on the meta device or with buffers alone; explain why it fails."""

import json
import logging
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, cast

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import is_peft_available

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.graph.binding import find_targets
from spp_fx.graph.program import Program
from spp_fx.graph.task import CAUSAL_LM, Task, classes, find_task, known_tasks, task_of
from spp_fx.storage.folder import ModelFolder

VERSION = f"transformers {transformers.__version__}"
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)
_KNOWN = (
    StrictDataclassError, SafetensorError, ImportError, OSError, ValueError, TypeError, LookupError, AttributeError,
    RuntimeError, AssertionError, ArithmeticError,
)  # fmt: skip
_LONGEST = 600
_ROW = re.compile(r"^(.+?)\s*\|\s*(MISMATCH|MISSING|CONVERSION)\s*\|(.*)$", re.MULTILINE)
_SHAPES = re.compile(r"ckpt: torch\.Size\((.*?)\) vs model: ?torch\.Size\((.*?)\)")
_LOGGER = logging.getLogger("transformers.modeling_utils")

Json = Mapping[str, Any]


CAUSAL = classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
"""Names of the classes that AutoModelForCausalLM makes."""
_HEADLESS = classes("MODEL_MAPPING_NAMES")


class Readable:
    """Turns the errors of transformers, and of what it calls, into one line about the folder.

    Attributes:
        folder: what is loaded.
        what: of it, in words that follow the folder's name.
        files: JSON files that are looked at first: a damaged one is named.
        kind: the error raised.
    """

    def __init__(
        self,
        folder: str | Path,
        what: str = "cannot be loaded",
        files: tuple[str, ...] = MODEL_FILES,
        kind: type[SppFxError] = FormatError,
    ) -> None:
        self.folder, self.what, self.files, self.kind = Path(folder), what, files, kind
        self.report = _Report()

    def __enter__(self) -> None:
        self.report.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        said = self.report.stop(show=error is None)
        if error is None or isinstance(error, SppFxError):
            return False
        # The tokenizers library raises Exception itself, not a subclass.
        if isinstance(error, _KNOWN) or kind is Exception:
            raise self.kind(f"{self.folder}: {self.what}: {self.reason(error, said)}") from error
        return False

    def reason(self, error: BaseException, report: str) -> str:
        """What is wrong and how to fix it, as far as the error and the folder's files show."""
        for name in self.files:
            if damage := _damage(self.folder / name):
                return damage
        config, said = read_json(self.folder / "config.json"), _words(error)
        reason = self._known_reason(error, said, config) or _misfits(said, report) or said
        method = quantization(config)
        if method and self.files == MODEL_FILES:
            reason = (
                f"its weights are quantized ({method}, quantization_config of config.json): {reason}; spp-fx works "
                "on the model before it was quantized"
            )
        return reason

    def _known_reason(self, error: BaseException, said: str, config: Json) -> str | None:
        if "trust_remote_code" in said and (found := self._own_code(config)):
            return f"it comes with code of its own ({found}), which runs only with --trust-remote-code; review it first"
        if isinstance(error, ImportError):
            return said if quantization(config) else f"a package is missing: {said}"
        if self.files != MODEL_FILES:
            # The tokenizers library raises Exception itself; transformers, which reads the file before it, KeyError.
            if type(error) is Exception or (
                isinstance(error, KeyError) and (self.folder / "tokenizer.json").exists()
            ):
                return f"tokenizer.json is not what the tokenizers library reads ({said}); get the file again"
            return self._no_tokenizer(said)
        if isinstance(error, KeyError) and error.args == ("metadata",):
            return 'model.safetensors.index.json has no metadata, which transformers needs; add "metadata": {} to it'
        model_type = config.get("model_type")
        if model_type is None and "model_type" in said:
            return "config.json names no model_type; get the file again"
        if isinstance(model_type, str) and model_type not in CONFIG_MAPPING and "auto_map" not in config:
            return (
                f"{VERSION} does not know model type '{model_type}' (config.json); a newer release may, or the model "
                "comes with code of its own, which --trust-remote-code runs"
            )
        if "Unrecognized configuration class" in said:
            return f"{VERSION} has no such model of type '{model_type}'; {holds(config)}"
        if "padding_idx" in said.lower():
            return _pad_token(config)
        return _unknown_value(error, config)

    def _own_code(self, config: Json) -> str | None:
        for name in dict.fromkeys(("config.json", *self.files)):
            found = config if name == "config.json" else read_json(self.folder / name)
            if "auto_map" in found:
                return f"auto_map of {name}"
        return None

    def _no_tokenizer(self, said: str) -> str | None:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if any(
            name.startswith(("tokenizer", "vocab", "spiece")) or name.endswith(".tiktoken") for name in names
        ):
            return None if "instantiate the backend" not in said else f"its vocabulary cannot be read: {said}"
        return "the folder has no tokenizer; copy the tokenizer files of the model that it was made from"


def folder_task(folder: str | Path, name: str | None = None, **kwargs: Any) -> Task | None:
    """The task of a folder's model: that of such a name, or the one of its configuration, None if it is not known."""
    if name is not None:
        return find_task(name)
    kwargs.setdefault("trust_remote_code", False)
    with Readable(folder):
        return task_of(AutoConfig.from_pretrained(str(folder), **kwargs))


def check_task(folder: Path, needs: str, taken: Collection[str] = (), **kwargs: Any) -> None:
    """UsageError if config.json says that a folder holds a model of a task that is not supported.

    Classes that transformers does not know are left to loading.

    Args:
        taken: names of tasks; empty: any that is known.
    """
    config = read_json(folder / "config.json")
    if not _architectures(config) or "auto_map" in config:
        return
    known = all(hasattr(transformers, name) for name in _architectures(config))
    task = folder_task(folder, **kwargs) if known else None
    if known and (task is None or (taken and task.name not in taken)):
        tasks = ", ".join(taken or (each.name for each in known_tasks()))
        raise UsageError(
            f"{folder}: {holds(config)}, and {needs} takes models for {tasks}; prune by magnitude, inject, merge, "
            "verify, lock and export to safetensors or cusparselt take others, too"
        )


def holds(config: Json) -> str:
    """What a folder holds by its configuration, in words."""
    named = _architectures(config)
    return (
        f"it holds a {named[0]} (architectures of config.json)"
        if named
        else "config.json names no architectures"
    )


def lacking(folder: str | Path, task: Task | None = None) -> str:
    """Why tensors of a model may be missing, by config.json and the task that was asked for."""
    config = read_json(Path(folder) / "config.json")
    named = _architectures(config)
    if named and "auto_map" not in config and (task is not None or named[0] not in CAUSAL):
        what = "another task" if task is None else task.name
        return f"{holds(config)}, and {what} may need tensors that it does not have"
    return "it is damaged, or config.json is of another model"


def quantization(config: Json) -> str | None:
    """The method that weights are quantized by, None where they are not."""
    found = config.get("quantization_config")
    if found is None:
        return None
    method = cast(Json, found).get("quant_method") if isinstance(found, dict) else None
    return method if isinstance(method, str) else "by a method that config.json does not name"


def read_json(path: Path) -> Json:
    """The JSON object in a file, empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(Json, found) if isinstance(found, dict) else {}


def _damage(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"{path.name} is not valid JSON ({error}); get the file again"
    return None if isinstance(found, dict) else f"{path.name} is not a JSON object; get the file again"


def _words(error: BaseException) -> str:
    """The whole message in one line: the first line alone often gives no reason."""
    only = error.args[0] if isinstance(error, KeyError) and error.args else error
    said = " ".join(str(only).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _unknown_value(error: BaseException, config: Json) -> str | None:
    """What is wrong with config.json, where an error quotes the value of one of its fields."""
    if isinstance(error, ZeroDivisionError):
        zero = [key for key, value in config.items() if type(value) is int and value == 0 and "num_" in key]
        return f"config.json: {' and '.join(zero)} must not be 0" if zero else None
    if not isinstance(error, LookupError | AttributeError):
        return None
    key = str(error.args[0]) if isinstance(error, KeyError) and error.args else None
    words = [key] if key is not None else re.findall(r"'([^']+)'", str(error))
    for field, value in _fields(config, ""):
        if value in words:
            return f"config.json: {field} '{value}' is unknown to {VERSION}"
    if key is not None and len(key.split()) == 1:
        return f"{VERSION} does not find {key!r}; config.json lacks it, or was written by another release"
    return None


def _fields(table: Json, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, str):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _fields(cast(Json, value), f"{prefix}{key}.")


def _pad_token(config: Json) -> str:
    tables = [config, *(cast(Json, value) for value in config.values() if isinstance(value, dict))]
    pad = next((table["pad_token_id"] for table in tables if table.get("pad_token_id") is not None), None)
    size = next((table["vocab_size"] for table in tables if "vocab_size" in table), None)
    return (
        f"config.json: pad_token_id {pad} is not a token of the vocabulary of {size} (vocab_size); set it to one that "
        "is, or to null"
    )


def _misfits(said: str, report: str) -> str | None:
    """The first rows of transformers' load report, where an error refers to it."""
    if "above report" not in said:
        return None
    rows: list[str] = []
    for found in _ROW.finditer(report):
        name, status, details = found.groups()
        shapes = _SHAPES.search(details)
        if shapes:
            rows.append(f"{name} is stored as {shapes[1]}, the model of config.json has {shapes[2]}")
        elif status == "CONVERSION":
            after = " ".join(report[found.end() :].partition("Notes:")[0].split())
            rows.append(f"{name} cannot be converted: {after[:200]}")
    if not rows:
        return said
    rows.sort()  # transformers keeps them in sets
    more = f", and {len(rows) - 2} more" if len(rows) > 2 else ""
    return f"{'; '.join(rows[:2])}{more}; the weights are damaged, or config.json is of another model"


def _architectures(config: Json) -> list[str]:
    found = config.get("architectures")
    return (
        [name for name in cast(list[Any], found) if isinstance(name, str)] if isinstance(found, list) else []
    )


class _Report(logging.Handler):
    """Keeps what transformers logs while it loads weights, which its errors refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []
        self.before = (logging.NOTSET, True)

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)

    def start(self) -> None:
        self.level_shown = _LOGGER.getEffectiveLevel()
        self.before = (_LOGGER.level, _LOGGER.propagate)
        _LOGGER.addHandler(self)
        _LOGGER.setLevel(min(self.level_shown, logging.WARNING))
        _LOGGER.propagate = False

    def stop(self, *, show: bool) -> str:
        """What was logged; with `show`, the handlers that it was kept from get it now."""
        _LOGGER.removeHandler(self)
        level, _LOGGER.propagate = self.before
        _LOGGER.setLevel(level)
        for record in self.kept if show else ():
            if record.levelno >= self.level_shown:
                _LOGGER.handle(record)
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(record.getMessage() for record in self.kept))


_ADAPTER = "adapter_config.json"


def load_model(
    folder: str | Path, *, dtype: torch.dtype | str = "auto", task: Task | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model of a folder, by default in its own dtype; never from a pickle file. For its class see `meta_model`.

    Raises:
        FormatError: the folder lacks a tensor of the model (transformers would fill it with random
            numbers), holds one of another shape, or cannot be loaded.
    """
    kwargs.setdefault("trust_remote_code", False)  # None would ask on stdin
    with Readable(folder), _without_adapter(Path(folder)) as own:
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        loaded: Any = _class_of(config, task).from_pretrained(
            str(own), dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    model, found = loaded
    for what, names in (("lacks", found["missing_keys"]), ("has another shape of", found["mismatched_keys"])):
        if names:
            first = sorted(map(str, names))[0]
            raise FormatError(
                f"{folder}: the checkpoint {what} {len(names)} of the model's tensors (first: {first}); "
                f"{lacking(folder, task)}"
            )
    return model


def meta_model(
    folder: str | Path, *, as_stored: bool = True, task: Task | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model of a folder on the meta device: shapes without weights.

    Its class is the one that config.json names, unless that is not one of the `task`'s: then the one that the task's
    auto class chooses. Parameters are tied as from_pretrained ties them, which takes more than config.json (see
    `_tie_as_stored`), unless `as_stored` is False: for a folder whose weight files are not the model's.
    """
    kwargs.setdefault("trust_remote_code", False)
    with Readable(folder):
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        if config.dtype is None:
            config.dtype = torch.float32
        with torch.device("meta"):
            model = _of_config(config, task, dtype=config.dtype, **kwargs)
    if as_stored:
        _tie_as_stored(model, Path(folder))
    return model


def hollow_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, task: Task | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model of a folder without its weights: buffers are real, parameters take no memory until read from.

    It is traced on the CPU, so that the constants of its graphs are real as well; `hollow` then takes the
    parameters away. `dtype` stands in for the folder's own. Parameters are tied as from_pretrained ties them.
    """
    kwargs.setdefault("trust_remote_code", False)
    with Readable(folder):
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        chosen = dtype or config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            model = _of_config(config, task, dtype=chosen, **kwargs)
        model.tie_weights()  # init_empty_weights makes a new parameter wherever one is registered
    _tie_as_stored(model, Path(folder))
    # Memory that was never written to takes no pages.
    _replace_parameters(model, lambda p: torch.empty_like(p, device="cpu"))
    return model


def _class_of(config: PretrainedConfig, task: Task | None) -> Any:
    chosen = task or task_of(config)
    causal = chosen is not None and chosen.name == CAUSAL_LM
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            continue
        if task is not None and not task.claims(name, config):
            continue
        if not causal or name not in CAUSAL | _HEADLESS:
            return found
    return getattr(transformers, chosen.auto if chosen else find_task(CAUSAL_LM).auto)


def _of_config(
    config: PretrainedConfig, task: Task | None, *, dtype: torch.dtype, **kwargs: Any
) -> PreTrainedModel:
    chosen = _class_of(config, task)
    if issubclass(chosen, PreTrainedModel):
        return chosen._from_config(config, dtype=dtype).eval()
    return chosen.from_config(config, dtype=dtype, **kwargs).eval()


def _tie_as_stored(model: PreTrainedModel, folder: Path) -> None:
    """Tie the parameters that from_pretrained would tie, given what the folder stores.

    `PreTrainedModel.tie_weights` decides it when a model is loaded: of two parameters that the configuration
    ties, one that is stored gives its values to one that is not, in either direction, and two that are stored
    are tied only where their values are equal in the model's dtype. This goes through the same pairs in the
    same order. A folder without safetensors files follows its configuration.

    Raises:
        FormatError: the folder's weights are damaged.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)).keys()
    pairs = {t: s for t, s in model.all_tied_weights_keys.items() if {t, s} <= parameters}  # not of buffers
    stored = _stored_weights(folder) if pairs else None
    if stored is None:
        return
    shapes = {name: stored.info(name)[1].shape for name in stored.names}
    tensors: dict[str, str | None] = {}  # parameter -> the stored tensor that fills it; None: it is converted
    for tensor, (parameter, pattern) in find_targets(model, shapes).items():
        tensors[parameter] = tensor if pattern is None else None
    for target in pairs:
        shared = model.get_parameter(target)
        own = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
        _set_parameter(model, target, own)
    for target, source in pairs.items():
        if target in tensors and source in tensors:
            if not _equal(stored, tensors[source], tensors[target], model.get_parameter(target).dtype):
                del model.all_tied_weights_keys[target]
                continue
        elif target in tensors:
            target, source = source, target
        elif source not in tensors:  # the values may be under a third name that shares the source
            others = (t for t, s in pairs.items() if s == source and t in tensors)
            source = next(others, source)
        _set_parameter(model, target, model.get_parameter(source))
        if source in tensors:
            tensors[target] = tensors[source]


def _stored_weights(folder: Path) -> ModelFolder | None:
    """The folder with its weights; None where it has no safetensors files, or is the id of a hub model."""
    if not folder.is_dir():
        return None
    try:
        return ModelFolder.open(folder)
    except UsageError:  # holds no weights
        return None


def _equal(stored: ModelFolder, first: str | None, second: str | None, dtype: torch.dtype) -> bool:
    """Whether two stored tensors have equal values in a dtype, read block by block.

    Tensors that a conversion makes count as different: two parameters with equal values compute what one does.
    """
    if first is None or second is None:
        return False
    if stored.info(first)[1].shape != stored.info(second)[1].shape:
        return False
    if not stored.info(first)[1].shape:
        return torch.equal(stored.read(first).to(dtype), stored.read(second).to(dtype))
    start = 0
    for block in stored.row_blocks(first):
        other = stored.read_rows(second, start, start + len(block))
        if not torch.equal(block.to(dtype), other.to(dtype)):
            return False
        start += len(block)
    return True


def _set_parameter(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = parameter


def hollow(program: Program) -> Program:
    """Put every parameter on the meta device: using one before it is filled is an error, not noise."""
    _replace_parameters(program, lambda p: torch.empty_like(p, device="meta"))
    return program


def _replace_parameters(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter by another, once where it has several names."""
    made: dict[int, nn.Parameter] = {}
    for each in list(module.modules()):
        for name, parameter in list(each._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter.detach()), requires_grad=False)
                each._parameters[name] = made[id(parameter)]


@contextmanager
def _without_adapter(folder: Path) -> Generator[Path, None, None]:
    """The folder; where transformers would load an adapter of PEFT on top of its model, a view of it without that.

    The view is a folder of links, so that the weights are read from where they are.
    """
    if not is_peft_available() or not (folder / _ADAPTER).is_file():
        yield folder
        return
    with TemporaryDirectory(prefix="spp-fx-") as view:
        for entry in folder.iterdir():
            if entry.name != _ADAPTER:
                Path(view, entry.name).symlink_to(entry.absolute())
        yield Path(view)
