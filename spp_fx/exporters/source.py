"""What is exported: a model folder with its lock."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.checkpoint import ModelFolder, copy_file, dtype_name, torch_dtype
from spp_fx.errors import MaskError
from spp_fx.exporters.manifest import TensorRecord, write_manifest
from spp_fx.sparsity import LOCK_NAME, Lock, LockEntry
from spp_fx.version import VERSION


@dataclass(frozen=True)
class Source:
    """A model folder to export, and the masks that the export is held to.

    Attributes:
        folder: the model's folder.
        lock: of its sparse weights.
        trust_remote_code: whether the folder's own model code may run.
        rounded_to: half precision that floating tensors are rounded to, None to keep their own.
    """

    folder: ModelFolder
    lock: Lock
    trust_remote_code: bool
    rounded_to: torch.dtype | None = None

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is exported in."""
        own = self.folder.info(name)[1].dtype
        floating = torch_dtype(own).is_floating_point
        return dtype_name(self.rounded_to) if floating and self.rounded_to is not None else own

    def stored(self, name: str) -> Tensor:
        """A tensor as it is exported: the model's, rounded where that was asked for, no zero gained."""
        value = self.folder.read(name)
        if self.rounded_to is None or not value.is_floating_point():
            return value
        rounded = value.to(self.rounded_to)
        if bool((rounded.isinf() & ~value.isinf()).any()):
            raise MaskError(f"{name}: a value is too large for {self.rounded_to}; choose another --dtype")
        smallest = torch.tensor(torch.finfo(self.rounded_to).tiny, dtype=self.rounded_to)
        return torch.where((value != 0) & (rounded == 0), torch.copysign(smallest, rounded), rounded)

    def canonical(self, entry: LockEntry) -> Tensor:
        stored = self.stored(entry.name)
        return stored.transpose(-1, -2) if entry.transposed else stored

    def copy_small_files(self, target: Path) -> None:
        """Configuration, tokenizer and whatever else is no weight."""
        for name in self.folder.other_files():
            if name.as_posix() != LOCK_NAME:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(self.folder.path / name, target / name)

    def record(self, entry: LockEntry, layout: str, reason: str | None = None, **extra: Any) -> TensorRecord:
        return TensorRecord(
            name=entry.name,
            shape=list(entry.shape),
            dtype=self.dtype(entry.name),
            layout=layout,
            reason=reason,
            transposed=entry.transposed,
            **extra,
        )

    def finish(
        self, folder: Path, format: str, lock: Lock, records: list[TensorRecord], **fields: Any
    ) -> None:
        """Write lock and manifest beside everything else."""
        (folder / LOCK_NAME).write_text(lock.dumps())
        fields = {"requirements": {}, "sizes": {}} | fields
        write_manifest(
            folder, spp_fx_version=VERSION, format=format, pattern=lock.pattern, tensors=records, **fields
        )
