"""The state of an optimizer, a schedule and the random generators as safetensors and JSON: no pickle."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spp_fx.errors import FormatError

OPTIMIZER = "optimizer"
RANDOM = "random_state"
LOSSES = "losses"
"""State of a checkpoint: the sums of the loss and its parts over the steps of its run."""
RECORD = "run.json"
"""File of a checkpoint with what its run was asked for."""


def split(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A nested state with its tensors moved to `tensors`, in a form that JSON holds."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, split(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [split(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"the state at {path or '/'} holds a {type(value).__name__}, which cannot be saved")


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists)."""
    (kind, content), *others = value.items()
    if others or kind not in ("tensor", "dict", "list", "value"):
        raise KeyError(kind)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join(item, tensors) for key, item in content}
    if kind == "list":
        return [join(item, tensors) for item in content]
    return content


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write a nested state as NAME.json and NAME.safetensors."""
    tensors: dict[str, Tensor] = {}
    skeleton = split(state, tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(skeleton))


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote; FormatError if it is damaged."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        return join(json.loads((folder / f"{name}.json").read_text()), tensors)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise FormatError(f"{folder}: the saved state '{name}' cannot be read: {error}") from error


def random_state() -> dict[str, Any]:
    """The state of the generators of Python, numpy and torch (every CUDA device too)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [item if not isinstance(item, tuple) else list(item) for item in random.getstate()],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def has_losses(checkpoint: Path) -> bool:
    """Whether a checkpoint has the sums of its run's losses; those of version 0.1.0 do not."""
    return (checkpoint / f"{LOSSES}.json").is_file()


def checkpoint_step(checkpoint: Path) -> int:
    """How many steps the run of a checkpoint had done."""
    return int(checkpoint.name.rpartition("-")[2])
