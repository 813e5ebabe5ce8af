"""What a caller of verify asks for, and whether it can be asked at all: told before anything is judged."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from spp_fx.checkpoint.header import regular_file_size
from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.sparsity import LOCK_NAME
from spp_fx.workflows.adapter_folder import CONFIG as ADAPTER_CONFIG
from spp_fx.workflows.artifact import open_artifact, refuse_part_of_export
from spp_fx.workflows.demands import Demands

_FILES = (".safetensors", ".onnx")
_MARKS = (MANIFEST, ADAPTER_CONFIG, "config.json", LOCK_NAME)


@dataclass(frozen=True)
class Check:
    """An artifact with everything it is held to.

    Attributes:
        lock: a lock file; None takes the one beside the artifact, if there is one.
        against: another artifact, whose masks must be the same.
        trust_remote_code: run code that a model folder brings, where its sites have to be found.
    """

    path: Path
    demands: Demands = field(default_factory=Demands)
    lock: Path | None = None
    against: Path | None = None
    trust_remote_code: bool = False


def check_request(check: Check) -> None:
    """Refuse a request that is wrong whatever the artifact holds; what is wrong later on is damage.

    Raises:
        UsageError: the artifact, the lock or the artifact to compare with is not there, or is nothing of the
            kind; the artifact is a part of another one; there is nothing to hold it to.
    """
    _check_artifact(check.path)
    if check.lock is not None:
        regular_file_size(check.lock)
    if check.against is not None:
        _check_artifact(check.against)
    elif check.lock is None and not check.demands.any and not os.path.lexists(_lock_beside(check.path)):
        _check_problems(check.path)


def nothing_to_hold_to(path: Path) -> UsageError:
    return UsageError(
        f"{path}: nothing to hold it to: it has no {LOCK_NAME}; "
        "give --pattern 2:4, --lock FILE or --against ARTIFACT"
    )


def _check_artifact(path: Path) -> None:
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist")
    if path.suffix not in _FILES and not _was_one(path):
        raise UsageError(f"{path} is not a model, adapter or export folder, nor a .safetensors or .onnx file")
    if path.suffix == ".safetensors":
        try:
            refuse_part_of_export(path)
        except UsageError:
            raise
        except SppFxError:
            return  # the export is damaged, which is a verdict


def _was_one(folder: Path) -> bool:
    """Whether a folder is an artifact, or what is left of one: without its config.json, or without weights."""
    if any(os.path.lexists(folder / mark) for mark in _MARKS):
        return True
    try:
        return folder.is_dir() and any(path.suffix in _FILES for path in folder.iterdir())
    except OSError:
        return True  # whoever opens it will tell why it cannot be read


def _lock_beside(path: Path) -> Path:
    return (path.parent if path.suffix in _FILES else path) / LOCK_NAME


def _check_problems(path: Path) -> None:
    """An artifact of which nothing is asked is one to be judged only if it is wrong by itself."""
    try:
        artifact = open_artifact(path)
    except (SppFxError, OSError):
        return
    if not artifact.problems and artifact.lock is None:
        raise nothing_to_hold_to(path)
