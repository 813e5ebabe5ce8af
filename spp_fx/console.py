"""What the command line shows: results on stdout, progress and log on stderr."""

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from spp_fx.parallel import no_tick


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
        if self._hides_bars:
            yield no_tick
            return
        from spp_fx import bars

        with bars.bytes_bar(title) as tick:
            yield tick

    @contextmanager
    def steps_bar(self, title: str, total: int | None = None) -> Generator["StepsBar", None, None]:
        """A bar that counts steps and tells the time left."""
        if self._hides_bars:
            yield StepsBar()
            return
        from spp_fx import bars

        with bars.steps_bar(title, total) as update:
            yield StepsBar(update)

    @property
    def _hides_bars(self) -> bool:
        return self.quiet or not sys.stderr.isatty()


class StepsBar:
    """A bar of steps whose length may be learned later, or nothing where no bar is shown."""

    def __init__(self, show: Callable[[int, int | None, str], None] | None = None) -> None:
        self._show = show

    def update(self, done: int, total: int | None = None, item: str = "") -> None:
        if self._show is not None:
            self._show(done, total, item)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; all columns but the first `left` are aligned to the right."""
    from rich.console import Console  # not loaded for commands that print lines
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
