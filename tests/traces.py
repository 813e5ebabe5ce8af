"""A model is traced once in a test process, and its ONNX graph is built once for all processes.

A trace of a small model takes three seconds, and most tests that need one are about something else. Models are told
apart by everything that a trace depends on; a model with code that is not transformers' own is always traced. A small
model without weights takes the trace of the same model on the CPU, whose ops and names are the same but for copies.
`SPP_FX_EXPORT_ALWAYS=1` switches it off, and so does the fixture `real_exports` for the tests of tracing itself.
"""

import copy
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.graph.model import load_model
from spp_fx.graph.program import Program

_traced: dict[str, Program] = {}
_failed: dict[str, SppFxError] = {}
enabled = "SPP_FX_EXPORT_ALWAYS" not in os.environ
across_devices = True
"""Whether a small model without weights takes the trace of the same model on the CPU."""

WHERE = ("_name_or_path", "name_or_path", "_commit_hash", "_is_hf_initialized", "_use_kernels", "training")
"""Attributes that differ by where a model came from: a configuration or a folder. A trace sets the mode itself."""
CPU, META = torch.device("cpu"), torch.device("meta")


class _Unknown(Exception):
    """The result may depend on something that the key does not hold."""


def once(trace: Callable[..., Program]) -> Callable[..., Program]:
    """`spp_fx.trace`, of a copy where the same model was traced before."""

    @wraps(trace)
    def traced(model: PreTrainedModel | str | Path, *args: Any, **kwargs: Any) -> Program:
        if not enabled:
            return trace(model, *args, **kwargs)
        if isinstance(model, str | Path):
            model = load_model(model)
        try:
            key = _digest([_model(model), _call(model.forward, model), args, kwargs])
        except _Unknown:
            return trace(model, *args, **kwargs)
        if key in _failed:
            raise _failed[key].with_traceback(None)
        if key not in _traced:
            real = _on_cpu(model) if _is_hollow(model) else model
            try:
                program = trace(real, *args, **kwargs)
            except SppFxError as error:
                _failed[key] = error
                raise
            _traced[key] = _without_weights(program)
            if real is model:
                return program
        return _of(_traced[key], model)

    return traced


def forget() -> None:
    """Keep no trace any longer."""
    _traced.clear()
    _failed.clear()


def graph_builder(build: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`build_graph` of the ONNX exporter, which takes five to fifteen seconds: once per model for all processes."""

    def built(model: nn.Module, **kwargs: Any) -> Any:
        try:
            key = _digest([_model(model), _call(model.forward, model), kwargs]) if enabled else None
        except _Unknown:
            key = None
        if key is None:
            return build(model, **kwargs)
        kept = folder / f"graph-{key}.pickle"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(build(model, **kwargs)))
        return pickle.loads(kept.read_bytes())

    return built


def _without_weights(program: Program) -> Program:
    """A copy of a program that its owner may change; parameters are on the meta device."""
    metas = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in program.parameters()
    }
    return _copy(program, dict[int, Any](metas))


def _is_hollow(model: nn.Module) -> bool:
    """Whether a model without weights is small enough for memory."""
    tensors = [*model.parameters(), *model.buffers()]
    hollow = (
        across_devices and all(t.device == META for t in tensors) and sum(t.numel() for t in tensors) < 2**24
    )
    return hollow and "forward" not in vars(model)  # which may hold the model itself


def _on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without weights that has some on the CPU, of any values."""
    twins: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device=CPU)
        twins[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, twins)


def _of(program: Program, model: PreTrainedModel) -> Program:
    """A copy of a program over the tensors of a model."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    twins: dict[int, Any] = {id(program.config): model.config}
    for name, tensor in (
        *program.named_parameters(remove_duplicate=False),
        *program.named_buffers(remove_duplicate=False),
    ):
        name = re.sub(r"@\d+", "", name)  # a module that is called twice stands twice in the tree
        if name in own:
            twins[id(tensor)] = own[name]
    copied = _copy(program, twins)
    copied.loss_function = model.loss_function
    copied.move_constants(CPU, copied.device)
    return copied.train(model.training)


def _copy(program: Program, twins: dict[int, Any]) -> Program:
    """A copy that holds, of the objects whose ids are given, those given instead of copies."""
    copied = copy.deepcopy(program, twins)
    # A copy of a GraphModule has only what its graph names; the rest of the tree was copied beside it.
    for module in program.modules():
        twin = twins[id(module)]
        for table in ("_modules", "_parameters", "_buffers"):
            getattr(twin, table).update(
                {name: twins.get(id(value), value) for name, value in getattr(module, table).items()}
            )
    return copied


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _model(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.models.") or config is None:
        raise _Unknown
    modules = []
    for name, module in model.named_modules():
        own = vars(module)
        if module._forward_hooks or module._forward_pre_hooks or ("forward" in own and module is not model):
            raise _Unknown
        if not type(module).__module__.startswith(("transformers.", "torch.")):
            raise _Unknown
        flags = {
            key: value
            for key, value in own.items()
            if isinstance(value, bool | int | float | str) and key not in WHERE
        }
        modules.append([name, f"{type(module).__module__}.{type(module).__qualname__}", flags])
    first: dict[int, str] = {}
    hollow = _is_hollow(model)
    tensors = [
        [name, first.setdefault(id(tensor), name), _value(tensor, CPU if hollow else tensor.device)]
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    ]
    implementations = [getattr(config, f"_{part}_implementation", None) for part in ("attn", "experts")]
    settings = {key: value for key, value in config.to_dict().items() if key not in WHERE}
    return [settings, implementations, modules, tensors]


def _call(function: Callable[..., Any], model: nn.Module) -> Any:
    """What a forward is: its code and what it has from around it."""
    if isinstance(function, MethodType):
        if function.__self__ is not model or function.__func__ is not type(model).forward:
            raise _Unknown
        return "the model's own"
    if not isinstance(function, FunctionType):
        raise _Unknown
    cells: tuple[CellType, ...] = function.__closure__ or ()
    code = function.__code__
    return [code.co_filename, code.co_firstlineno, [_call(cell.cell_contents, model) for cell in cells]]


def _value(tensor: Tensor, device: torch.device) -> Any:
    return [str(tensor.dtype), list(tensor.shape), list(tensor.stride()), str(device)]
