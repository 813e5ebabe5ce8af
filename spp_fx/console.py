"""What the command line shows: results on stdout, progress and log on stderr."""

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

ERR = Console(stderr=True, highlight=False)


class Output:
    """Where one command writes: `json` makes the result JSON, `quiet` drops everything but the result."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        # Under torchrun every process runs the command, and the first one speaks.
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.quiet = quiet or not self.speaks

    def say(self, line: str) -> None:
        """A line for the reader, on stderr."""
        if not self.quiet:
            click.echo(line, err=True)

    def result(self, data: Any, show: Callable[[], None]) -> None:
        """The result: `data` as JSON, or whatever `show` prints."""
        if not self.speaks:
            return
        if self.as_json:
            click.echo(json.dumps(data, indent=2))
        else:
            show()

    @contextmanager
    def bytes_bar(self, title: str) -> Generator[Callable[[str, int], None], None, None]:
        """A bar that counts bytes; what it yields is called with a tensor's name and size."""
        columns = (TextColumn("{task.description}"), DownloadColumn(), TextColumn("{task.fields[item]}"))
        with self._bar(columns) as progress:
            task = progress.add_task(title, total=None, item="")
            done = 0

            def tick(what: str, nbytes: int) -> None:
                nonlocal done
                done += nbytes
                progress.update(task, completed=done, item=what)

            yield tick

    @contextmanager
    def steps_bar(self, title: str, total: int | None = None) -> Generator["StepsBar", None, None]:
        """A bar that counts steps and tells the time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[item]}"),
        )
        with self._bar(columns) as progress:
            yield StepsBar(progress, title, total)

    @contextmanager
    def _bar(self, columns: Sequence[Any]) -> Generator[Progress, None, None]:
        hidden = self.quiet or not sys.stderr.isatty()
        with Progress(*columns, console=ERR, disable=hidden, transient=True) as progress:
            yield progress


class StepsBar:
    """A bar of steps whose length may be learned later."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, item="")

    def update(self, done: int, total: int | None = None, item: str = "") -> None:
        if total is not None:
            self._progress.update(self._task, total=total)
        self._progress.update(self._task, completed=done, item=item)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; all columns but the first `left` are aligned to the right."""
    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        grid.add_column(
            heading, justify="left" if index < left else "right", overflow="fold", no_wrap=index < left
        )
    for row in rows:
        grid.add_row(*row)
    # Piped output is never cut to a terminal's width.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(grid)


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def shape(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
