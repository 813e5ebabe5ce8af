"""Adapter folders: configuration, factors, lock and model card."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from spp_fx.adapters.method import Method, make_method
from spp_fx.adapters.per_site import from_patterns, to_patterns
from spp_fx.errors import FormatError, UsageError
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, load_lock
from spp_fx.sparsity.scan import scan_file
from spp_fx.storage.folder import ModelFolder, PeftAdapter, is_adapter, peft_adapter
from spp_fx.storage.safetensors import Shard, dtype_name
from spp_fx.storage.strict_json import read_object
from spp_fx.storage.writer import write_safetensors
from spp_fx.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor


CONFIG = "adapter_config.json"
FACTORS = "adapter_model.safetensors"
FORMAT_VERSION = 1
FINISHED = "finished.json"
"""File of the newest checkpoint once its run has written the adapter's factors."""


class StoredMatrix(BaseModel):
    """One stored matrix of a site.

    Attributes:
        tensor: its name in the checkpoint.
        transposed: whether it is stored (in, out).
        expert: its index in a stack of experts, None for a plain matrix.
        start, stop: the rows of the site's matrix that it holds.
        whole: whether the stored tensor is the whole stack, of which this is one matrix.
        offset: the row of the stored tensor at which it begins, where that holds the rows of several sites; else
            None, and not written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    tensor: str
    transposed: bool
    expert: int | None
    start: int
    stop: int
    whole: bool
    offset: int | None = None

    @property
    def held(self) -> slice:
        """Its rows in the stored tensor."""
        return (
            slice(None) if self.offset is None else slice(self.offset, self.offset + self.stop - self.start)
        )

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "offset" or value is not None}


class AdapterConfig(BaseModel):
    """adapter_config.json: PEFT's keys where they mean the same, ours beside them.

    An option that differs between sites has a key of its own besides, such as `rank_pattern`, see `to_patterns`.

    Attributes:
        task_type: PEFT's name of the task, if it has one.
        task: what the model is run for.
        trained_parameters: norms and biases that are trained themselves, each with the tensors of the checkpoint that
            hold it; None, and not written, where there are none.
    """

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    format_version: Literal[1]
    spp_fx_version: str
    peft_type: str
    task_type: str | None
    task: str = "causal-lm"
    base_model_name_or_path: str
    base_model_fingerprint: str
    method: str
    method_parameters: dict[str, float | int | bool | str]
    r: int | None
    target_modules: list[str]
    bias: Literal["none"]
    inference_mode: bool
    seed: int
    sites: dict[str, list[StoredMatrix]]
    trained_parameters: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder that has been read and checked.

    Attributes:
        method: with the options that sites have by default.
        methods: of each site.
        matrices: the stored matrices of each site.
        lock: the masks of the base.
        shard: the file of the factors.
    """

    path: Path
    config: AdapterConfig
    method: Method
    methods: dict[str, Method]
    matrices: dict[str, tuple[StoredMatrix, ...]]
    lock: Lock
    shard: Shard

    @classmethod
    def open(cls, path: Path) -> "AdapterFolder":
        """Read an adapter folder and check that it has every factor, in its shape, and no other.

        Raises:
            UsageError: not an adapter folder, or an adapter of PEFT.
            FormatError: a file is damaged; names it and the fault.
        """
        if (foreign := peft_adapter(path)) is not None:
            raise UsageError(_not_ours(path, foreign))
        if not (path / CONFIG).is_file():
            reason = (
                f"is not an adapter folder, since it has no {CONFIG}"
                if path.exists()
                else "there is no such adapter folder"
            )
            raise UsageError(f"{path}: {reason}; make one with 'spp-fx inject MODEL'")
        config = _read_config(path / CONFIG)
        try:
            method = make_method(config.method, **config.method_parameters)
            methods = from_patterns(method, config.sites, config.model_extra or {})
        except (TypeError, UsageError, FormatError) as error:
            raise FormatError(f"{path / CONFIG}: {error}") from error
        matrices = {site: tuple(stored) for site, stored in config.sites.items()}
        lock, shard = load_lock(path / LOCK_NAME), Shard.open(path / FACTORS)
        folder = cls(path, config, method, methods, matrices, lock, shard)
        folder._check()
        return folder

    @cached_property
    def _entries(self) -> dict[str, LockEntry]:
        return self.lock.by_name()

    def shape(self, site: str) -> tuple[int, ...]:
        """The canonical shape of a site."""
        matrices = self.matrices[site]
        entry = self._entries[matrices[0].tensor]
        out = max(matrix.stop for matrix in matrices)
        if matrices[0].expert is None:
            return (out, entry.shape[-1])
        return (max(matrix.expert or 0 for matrix in matrices) + 1, out, entry.shape[-1])

    @property
    def trained(self) -> dict[str, list[str]]:
        """Norms and biases that are trained, by parameter: the tensors of the checkpoint that hold it."""
        return self.config.trained_parameters or {}

    def factors(self, site: str, expert: int | None = None) -> dict[str, NDArray[np.float64]]:
        """The factors of a site in float64, or of one expert of a stack."""
        return {
            key: self.shard.read_float64(f"{site}.{key}", expert)
            for key in self.methods[site].factors(self.shape(site))
        }

    def check_finite(self) -> None:
        """FormatError if a factor, norm or bias holds NaN or infinity; names it and the place of the first."""
        for name, info in self.shard.header.tensors.items():
            vector = len(info.shape) == 1
            shape = (1, prod(info.shape)) if vector else info.shape
            scan = scan_file(self.shard.path, info.start, shape, info.dtype)
            if scan.first_non_finite is not None:
                place = f"entry {scan.first_non_finite[-1]}" if vector else scan.position
                raise FormatError(
                    f"{self.shard.path}: {name} holds {scan.non_finite} NaN or infinite values, first at {place}; "
                    "training stores only finite ones, so restore the file, or inject and train anew"
                )

    def finish(self) -> None:
        """Mark the newest checkpoint, if there is one, as that of a run whose factors are in the folder."""
        for checkpoint in whole_checkpoints(self.path)[-1:]:
            (checkpoint / FINISHED).write_text("{}\n")

    def unfinished(self) -> str | None:
        """A warning where training was stopped after a checkpoint, so that the factors are still those before it."""
        whole = whole_checkpoints(self.path)
        if not whole or (whole[-1] / FINISHED).is_file():
            return None
        return (
            f"{self.path}: warning: its training was stopped after {whole[-1].name}, and its factors are those from "
            f"before that training; 'spp-fx train {self.path} ... --resume' finishes it"
        )

    def find_base(self, base: Path | None = None) -> Path:
        """The base model's folder: as given, as recorded, or under the recorded name beside the adapter."""
        if base is not None:
            return base
        recorded = Path(self.config.base_model_name_or_path)
        for candidate in (recorded, self.path.resolve().parent / recorded.name):
            if candidate.is_dir():
                return candidate
        raise UsageError(
            f"{self.path}: its base model {recorded} is missing; put it beside the adapter "
            f"as {recorded.name}, or give it with --base"
        )

    def check_base(self, base: ModelFolder) -> None:
        """FormatError unless `base` is the model that the adapter was made for, unchanged."""
        if base.fingerprint() != self.config.base_model_fingerprint:
            raise FormatError(
                f"{base.path}: is not the base model of {self.path} "
                f"({self.config.base_model_name_or_path}), or has changed since 'spp-fx inject'; "
                "restore it, or give the right one with --base"
            )

    def _check(self) -> None:
        where = self.path / FACTORS
        locked = self.lock.by_name()
        expected: dict[str, tuple[int, ...]] = {}
        for site, matrices in self.matrices.items():
            missing = [matrix.tensor for matrix in matrices if matrix.tensor not in locked]
            if missing or not matrices:
                raise FormatError(f"{self.path / LOCK_NAME}: has no entry for {[*missing, site][0]}")
            shape = self.shape(site)
            if reason := self.methods[site].refusal(shape):
                raise FormatError(f"{self.path / CONFIG}: {site}: {reason}")
            factors = self.methods[site].factors(shape)
            expected |= {f"{site}.{key}": spec.shape for key, spec in factors.items()}
        for name in self.trained:
            if name in expected:
                raise FormatError(f"{self.path / CONFIG}: {name} is trained, and a factor has its name")
            info = self.shard.header.tensors.get(name)
            if info is not None and (len(info.shape) != 1 or info.dtype not in ("F32", "F64")):
                raise FormatError(
                    f"{where}: {name} has shape {list(info.shape)} and type {info.dtype}, expected a vector of F32 or "
                    "F64"
                )
            expected[name] = info.shape if info is not None else ()
        held = {name: info.shape for name, info in self.shard.header.tensors.items()}
        for name in sorted(expected.keys() | held.keys()):
            if name not in held:
                raise FormatError(f"{where}: the factor {name} is missing")
            if name not in expected:
                raise FormatError(f"{where}: {name} is not a factor of any site in {CONFIG}")
            if held[name] != expected[name]:
                raise FormatError(
                    f"{where}: {name} has shape {list(held[name])}, expected {list(expected[name])}"
                )


def _not_ours(path: Path, foreign: PeftAdapter) -> str:
    if is_adapter(path):
        return foreign.refusal
    ModelFolder.open(path)  # raises for a PEFT adapter with its base's config.json but no weights
    return (
        f"{path}: is a model folder with {foreign.what} in it, not an adapter folder; "
        f"make one with 'spp-fx inject {path}'"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of training in an adapter folder, `checkpoint-STEP`, in the order of their steps."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those of `checkpoints` that were written to their end: the Trainer writes its own state last.

    The length of every safetensors file is checked against its header, which finds one that was cut short.
    """
    return [checkpoint for checkpoint in checkpoints(folder) if _is_whole(checkpoint)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        return bool([Shard.open(path) for path in checkpoint.glob("*.safetensors")])
    except (OSError, ValueError, FormatError):
        return False


def write_factors(path: Path, factors: "Mapping[str, Tensor]") -> None:
    """Write the file of the factors; `path` must be new."""
    specs = [(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in factors.items()]
    write_safetensors(path, specs, factors.__getitem__, {"format": "pt"})


def write_adapter(
    folder: Path,
    *,
    target: Path,
    base: Path,
    fingerprint: str,
    method: Method,
    methods: Mapping[str, Method],
    seed: int,
    matrices: Mapping[str, Iterable[StoredMatrix]],
    factors: "Mapping[str, Tensor]",
    lock: Lock,
    trained: Mapping[str, Iterable[str]] | None = None,
    init: str = "default",
    task: tuple[str, str | None] = ("causal-lm", "CAUSAL_LM"),
) -> None:
    """Write the files of an adapter folder into `folder`, which becomes `target`.

    Args:
        methods: of each site; what differs from `method` is kept beside it.
        factors: with the values of trained norms and biases.
        trained: the checkpoint's tensors of each of these.
        task: its name, and PEFT's.
    """
    start = {} if init == "default" else {"init": init}
    config = AdapterConfig(
        format_version=FORMAT_VERSION,
        spp_fx_version=VERSION,
        peft_type=method.name.upper(),
        task_type=task[1],
        task=task[0],
        base_model_name_or_path=os.path.abspath(base),
        base_model_fingerprint=fingerprint,
        method=method.name,
        method_parameters=method.parameters(),
        r=getattr(method, "rank", None),
        target_modules=sorted({site.removesuffix(".weight").rpartition(".")[2] for site in matrices}),
        bias="none",
        inference_mode=True,
        seed=seed,
        sites={site: list(stored) for site, stored in matrices.items()},
        trained_parameters={name: list(tensors) for name, tensors in (trained or {}).items()} or None,
        **start,
        **to_patterns(method, methods),
    )
    left_out = None if config.trained_parameters else {"trained_parameters"}
    (folder / CONFIG).write_text(config.model_dump_json(indent=2, exclude=left_out) + "\n")
    (folder / LOCK_NAME).write_text(lock.dumps())
    (folder / "README.md").write_text(_card(target, base, config, method, factors))
    write_factors(folder / FACTORS, factors)


def trainable_parameters(factors: "Mapping[str, Tensor]") -> int:
    return sum(value.numel() for value in factors.values())


def _read_config(path: Path) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate(read_object(path), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:200] for part in fault["loc"])
        raise FormatError(f"{path}: {where}: {fault['msg']}") from error


def _card(
    target: Path, base: Path, config: AdapterConfig, method: Method, factors: "Mapping[str, Tensor]"
) -> str:
    rank = "" if config.r is None else f", rank {config.r}"
    zeros = (
        "It trains the non-zeros and leaves every zero where it is"
        if method.masked
        else "Its update is dense while training, and merging removes what lies on zeros"
    )
    count = len(config.trained_parameters or ())
    beside = f" and {count} norms and biases" if count else ""
    return f"""---
library_name: spp-fx
base_model: {base.name}
tags: [sparse, {config.method}]
---

# {target.name}

Factors of {config.method.upper()}{rank}, for the pruned model `{base.name}`:
{trainable_parameters(factors):,} trainable parameters over {len(config.sites)} weights{beside}.
{zeros};
`{LOCK_NAME}` holds the masks.

```
spp-fx train {target.name} --data text.txt
spp-fx merge {target.name} --verify-sparsity
```
"""
