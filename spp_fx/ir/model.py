"""Causal language models of model folders: with their weights, or without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spp_fx.errors import FormatError
from spp_fx.ir.program import Program
from spp_fx.ir.unreadable import Readable, lacking


def load_model(folder: str | Path, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a folder, by default in its own dtype; never from a pickle file.

    Raises:
        FormatError: the folder lacks a tensor of the model (transformers would fill it with random
            numbers), holds one of another shape, or cannot be made a model of.
    """
    kwargs.setdefault("trust_remote_code", False)  # None would ask on stdin
    with _readable(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
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


def meta_model(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model a folder's config.json describes, on the meta device: shapes without weights."""
    kwargs.setdefault("trust_remote_code", False)
    with _readable(folder):
        config = AutoConfig.from_pretrained(str(folder), **kwargs)
        if config.dtype is None:
            config.dtype = torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype, **kwargs).eval()


def hollow_model(folder: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a folder without its weights: buffers are real, parameters take no memory until read from.

    It is traced on the CPU, so that the constants of its graphs are real as well; `hollow` then takes the
    parameters away. `dtype` stands in for the folder's own.
    """
    kwargs.setdefault("trust_remote_code", False)
    with _readable(folder):
        config = AutoConfig.from_pretrained(str(folder), **kwargs)
        chosen = dtype or config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen, **kwargs).eval()
        model.tie_weights()  # registering a parameter made a new one of it
    # An address range that nothing was written to has no pages.
    _replace_parameters(model, lambda p: torch.empty_like(p, device="cpu"))
    return model


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


def _readable(folder: str | Path) -> Readable:
    """What transformers says of a folder that it cannot make a model of, as one line."""
    return Readable(folder)
