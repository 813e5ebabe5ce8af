"""Report files: whole or absent, in folders that are made for them."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from spp_fx.checkpoint import atomic_file
from spp_fx.errors import SppFxError


def write_report(target: Path, text: str) -> None:
    """Write or replace a report.

    Raises:
        SppFxError: it cannot be written; whatever was there before still is.
    """
    if os.path.lexists(target) and not target.is_dir() and not target.is_file():
        raise _unwritten(target, "there is a pipe, a device or a link that leads nowhere")
    try:
        with atomic_file(target, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except SppFxError as error:
        raise _unwritten(target, str(error)) from error


def append_report(target: Path, text: str) -> None:
    """Add to a file that others write to as well, as a step summary of GitHub is.

    Raises:
        SppFxError: it cannot be written.
    """
    try:
        with target.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise _unwritten(target, error.strerror or str(error)) from error


def write_all(writes: Iterable[Callable[[], None]]) -> None:
    """Write every report, also after one that could not be; then raise what could not."""
    failures: list[SppFxError] = []
    for write in writes:
        try:
            write()
        except SppFxError as error:
            failures.append(error)
    if failures:
        raise SppFxError("; ".join(map(str, failures))) from failures[0]


def _unwritten(target: Path, why: str) -> SppFxError:
    return SppFxError(f"{target}: the report was not written: {why}")
