"""torch.export runs once per model and signature in a test process; every later export copies the first one's result.

An export of a small model takes two seconds, and most tests that need one are about something else. Only the call
of torch.export is saved: everything that spp_fx does before and after it runs every time. Models are told
apart by everything that an export depends on; a model with code that is not transformers' own is always exported.
`SPP_FX_EXPORT_ALWAYS=1` switches it off, and so does the fixture `real_exports` for the tests of tracing itself.
"""

import copy
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.export import ExportedProgram

_export = torch.export.export
_exported: dict[str, ExportedProgram] = {}
_failed: dict[str, Exception] = {}
_tracebacks: dict[str, Any] = {}
enabled = "SPP_FX_EXPORT_ALWAYS" not in os.environ

WHERE = ("_name_or_path", "name_or_path", "_commit_hash")
"""Attributes that say where a model came from."""


class _Unknown(Exception):
    """The result may depend on something that the key does not hold."""


def export(model: nn.Module, args: tuple[Any, ...], **options: Any) -> ExportedProgram:
    """`torch.export.export`, of a copy where the same was exported before."""
    if not enabled:
        return _export(model, args, **options)
    try:
        key = _key(model, args, options)
    except _Unknown:
        return _export(model, args, **options)
    if key in _failed:
        error = _failed[key]
        raise error.with_traceback(_tracebacks[key])
    if key not in _exported:
        try:
            first = _export(model, args, **options)
        except Exception as error:
            _failed[key], _tracebacks[key] = error, error.__traceback__
            raise
        _exported[key] = _copy(first, {}, {})
        return first
    return _copy(_exported[key], model.state_dict(keep_vars=True), dict(model.named_buffers()))


def graph_builder(build: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`build_graph` of the ONNX exporter, which takes five to fifteen seconds: once per model for all processes."""

    def built(model: nn.Module, *, with_past: bool = False) -> Any:
        try:
            key = _digest([_model(model), _call(model.forward, model), with_past]) if enabled else None
        except _Unknown:
            key = None
        if key is None:
            return build(model, with_past=with_past)
        kept = folder / f"graph-{key}.pickle"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(build(model, with_past=with_past)))
        return pickle.loads(kept.read_bytes())

    return built


def _copy(program: ExportedProgram, state: dict[str, Any], buffers: dict[str, Tensor]) -> ExportedProgram:
    """A program of its own, over tensors of another model where it has them."""
    graph_module = copy.deepcopy(program.graph_module)
    constants = {name: buffers.get(name, value) for name, value in program.constants.items()}
    return ExportedProgram(
        graph_module,
        graph_module.graph,
        copy.deepcopy(program.graph_signature),
        {name: state.get(name, value) for name, value in program.state_dict.items()},
        dict(program.range_constraints),
        copy.deepcopy(program.module_call_graph),
        program.example_inputs,
        constants,
        verifiers=program.verifiers,
    )


def _key(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    return _digest([_model(model), _call(model.forward, model), _value(args), repr(sorted(options.items()))])


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
    tensors = [
        [name, first.setdefault(id(tensor), name), tensor.requires_grad, _value(tensor)]
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


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), list(value.stride()), str(value.device)]
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    raise _Unknown
