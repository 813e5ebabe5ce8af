"""Models of folders: with their weights, or without them."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import is_peft_available

from spp_fx.checkpoint import ModelFolder
from spp_fx.errors import FormatError, UsageError
from spp_fx.ir.binding import find_targets
from spp_fx.ir.program import Program
from spp_fx.ir.unreadable import Readable, lacking


def _classes(mapping: Mapping[str, str | Sequence[str]]) -> frozenset[str]:
    return frozenset(
        name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)
    )


CAUSAL = _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Names of the classes that AutoModelForCausalLM makes."""
_HEADLESS = _classes(MODEL_MAPPING_NAMES)
_ADAPTER = "adapter_config.json"


def load_model(folder: str | Path, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> PreTrainedModel:
    """The model of a folder, by default in its own dtype; never from a pickle file. For its class see `meta_model`.

    Raises:
        FormatError: the folder lacks a tensor of the model (transformers would fill it with random
            numbers), holds one of another shape, or cannot be made a model of.
    """
    kwargs.setdefault("trust_remote_code", False)  # None would ask on stdin
    with Readable(folder), _without_adapter(Path(folder)) as own:
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        loaded: Any = _class_of(config).from_pretrained(
            str(own), dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    model, found = loaded
    for what, names in (("lacks", found["missing_keys"]), ("has another shape of", found["mismatched_keys"])):
        if names:
            first = sorted(map(str, names))[0]
            raise FormatError(
                f"{folder}: the checkpoint {what} {len(names)} of the model's tensors (first: {first}); "
                f"{lacking(folder)}"
            )
    return model


def meta_model(folder: str | Path, *, as_stored: bool = True, **kwargs: Any) -> PreTrainedModel:
    """The model of a folder on the meta device: shapes without weights.

    Its class is that of AutoModelForCausalLM, unless config.json names one of transformers' for another task:
    a Whisper is taken whole, although its decoder alone would make a causal language model. Parameters are tied
    as from_pretrained ties them, which takes more than config.json (see `_tie_as_stored`), unless `as_stored` is
    False: for a folder whose weight files are not the model's.
    """
    kwargs.setdefault("trust_remote_code", False)
    with Readable(folder):
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        if config.dtype is None:
            config.dtype = torch.float32
        with torch.device("meta"):
            model = _of_config(config, dtype=config.dtype, **kwargs)
    if as_stored:
        _tie_as_stored(model, Path(folder))
    return model


def hollow_model(folder: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a folder without its weights: buffers are real, parameters take no memory until read from.

    It is traced on the CPU, so that the constants of its graphs are real as well; `hollow` then takes the
    parameters away. `dtype` stands in for the folder's own. Parameters are tied as from_pretrained ties them.
    """
    kwargs.setdefault("trust_remote_code", False)
    with Readable(folder):
        config: Any = AutoConfig.from_pretrained(str(folder), **kwargs)
        chosen = dtype or config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            model = _of_config(config, dtype=chosen, **kwargs)
        model.tie_weights()  # registering a parameter made a new one of it
    _tie_as_stored(model, Path(folder))
    # An address range that nothing was written to has no pages.
    _replace_parameters(model, lambda p: torch.empty_like(p, device="cpu"))
    return model


def _class_of(config: PretrainedConfig) -> Any:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if name in CAUSAL or not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            continue
        headless = name in _HEADLESS and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if headless and not config.is_encoder_decoder:
            continue  # its head may be the embedding, and is missed where it is not
        return found
    return AutoModelForCausalLM


def _of_config(config: PretrainedConfig, *, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    chosen = _class_of(config)
    if chosen is AutoModelForCausalLM:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
    return chosen._from_config(config, dtype=dtype).eval()


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
    """Put every parameter on the meta device: to use one that nobody filled in is an error, not noise."""
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
