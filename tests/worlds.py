"""Folders that are made once for all test processes of a run, and read by all."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.command import listing


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that the workers of one pytest-xdist run share."""
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills: by the first process that asks, while others wait for it.

    Tests read it. One that writes takes a copy; `assert_untouched` finds those that do not.
    """
    folder = session_folder(factory) / "worlds" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.write_text(_state(folder))
    return folder


def assert_untouched(folder: Path) -> None:
    assert _state(folder) == folder.with_name(f"{folder.name}.done").read_text(), (
        f"{folder}: a test wrote to a folder that all tests share; let it work on a copy"
    )


def _state(folder: Path) -> str:
    return "\n".join(f"{name} {digest}" for name, digest in listing(folder).items())
