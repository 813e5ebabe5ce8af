"""What the command line shows: results on stdout, progress and log on stderr.

rich is imported with the first table or bar: commands that print lines to a pipe do without it.
"""

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from spp_fx.parallel import no_tick

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


class Output:
    """Where one command writes: `as_json` makes the result JSON, `quiet` drops everything but the result."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        # Under torchrun every process runs the command, and the first one speaks.
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.quiet = quiet or not self.speaks
        self._shows_bars = not self.quiet and sys.stderr.isatty()

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
        if not self._shows_bars:
            yield no_tick
            return
        from rich.progress import DownloadColumn

        with _progress(DownloadColumn()) as progress:
            task = progress.add_task(title, total=None, item="")

            def tick(what: str, nbytes: int) -> None:
                progress.update(task, advance=nbytes, item=what)

            yield tick

    @contextmanager
    def steps_bar(self, title: str, total: int | None = None) -> Generator["StepsBar", None, None]:
        """A bar that counts steps and shows the time left."""
        if not self._shows_bars:
            yield StepsBar()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        with _progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task(title, total=total, item="")

            def show(done: int, known: int | None, item: str) -> None:
                if known is not None:
                    progress.update(task, total=known)
                progress.update(task, completed=done, item=item)

            yield StepsBar(show)


class StepsBar:
    """A bar of steps whose length may be learned later, or nothing where no bar is shown."""

    def __init__(self, show: Callable[[int, int | None, str], None] | None = None) -> None:
        self._show = show

    def update(self, done: int, total: int | None = None, item: str = "") -> None:
        if self._show is not None:
            self._show(done, total, item)


@contextmanager
def _progress(*columns: "ProgressColumn") -> Generator["Progress", None, None]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    title, item = TextColumn("{task.description}"), TextColumn("{task.fields[item]}")
    console = Console(stderr=True, highlight=False)
    with Progress(title, *columns, item, console=console, transient=True) as progress:
        yield progress


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; all columns but the first `left` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

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
