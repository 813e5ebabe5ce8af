"""What the command line shows: results on stdout, progress and log on stderr.

rich is imported with the first table or bar: commands that print lines to a pipe do without it.
"""

import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import click

from spp_fx.errors import escaped
from spp_fx.parallel import no_tick

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


SECONDS_BETWEEN_LINES = 60


class Result(Protocol):
    """What a verb returns: the same facts for programs and for people."""

    def to_json(self) -> Any: ...

    def lines(self) -> "Iterable[str | Table]": ...


class Output:
    """Where one command writes: `as_json` makes the result JSON, `quiet` drops everything but the result."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        # Under torchrun every process runs the command; only the first one prints.
        self.prints = os.environ.get("RANK", "0") == "0"
        self.quiet = quiet or not self.prints
        self._shows_bars = not self.quiet and sys.stderr.isatty()

    def say(self, line: str) -> None:
        """A line for the reader, on stderr."""
        if not self.quiet:
            click.echo(line, err=True)

    def result(self, done: Result) -> None:
        """The result of a verb, as JSON or as text."""
        if not self.prints:
            return
        if self.as_json:
            click.echo(json.dumps(done.to_json(), indent=2))
            return
        self.show(done.lines())

    def show(self, lines: "Iterable[str | Table]") -> None:
        """Lines and tables on stdout, one by one."""
        for line in lines:
            if isinstance(line, Table):
                line.print()
            else:
                click.echo(line)

    @contextmanager
    def bytes_bar(self, title: str) -> Generator[Callable[[str, int], None], None, None]:
        """A bar, or lines, that counts bytes; what it yields is called with a tensor's name and size."""
        if not self._shows_bars:
            yield no_tick if self.quiet else _bytes_now_and_then(title, self.say)
            return
        from rich.progress import DownloadColumn

        with _progress(DownloadColumn()) as progress:
            task = progress.add_task(title, total=None, item="")

            def tick(what: str, nbytes: int) -> None:
                progress.update(task, advance=nbytes, item=what)

            yield tick

    @contextmanager
    def steps_bar(self, title: str, total: int | None = None) -> Generator["StepsBar", None, None]:
        """A bar that counts steps and shows the time left; a line now and then where no bar can be shown."""
        if not self._shows_bars:
            yield StepsBar() if self.quiet else StepsBar(_now_and_then(title, total, self.say))
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


def _now_and_then(
    title: str, total: int | None, say: Callable[[str], None], spell: Callable[[int], str] = "{:,}".format
) -> Callable[[int, int | None, str], None]:
    """Steps as lines, for logs: none in the first minute, then one a minute at most."""
    last = monotonic()

    def show(done: int, known: int | None, item: str) -> None:
        nonlocal last
        if monotonic() - last >= SECONDS_BETWEEN_LINES:
            of = known or total
            say(f"{title}: {spell(done)}{f' of {spell(of)}' if of else ''}{f', {item}' if item else ''}")
            last = monotonic()

    return show


def _bytes_now_and_then(title: str, say: Callable[[str], None]) -> Callable[[str, int], None]:
    show, done = _now_and_then(title, None, say, megabytes), 0

    def tick(what: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        show(done, None, what)

    return tick


@contextmanager
def _progress(*columns: "ProgressColumn") -> Generator["Progress", None, None]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    title, item = TextColumn("{task.description}"), TextColumn("{task.fields[item]}")
    console = Console(stderr=True, highlight=False)
    with Progress(title, *columns, item, console=console, transient=True) as progress:
        yield progress


@dataclass(frozen=True)
class Table:
    """Rows under headings; all columns but the first `left` are aligned to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def print(self) -> None:
        from rich import table
        from rich.console import Console

        grid = table.Table(box=None, pad_edge=False, header_style="bold")
        for index, heading in enumerate(self.headings):
            left = index < self.left
            grid.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=left)
        for row in self.rows:
            grid.add_row(*row)
        # Piped output is never cut to a terminal's width.
        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(grid)


def grouped(reasons: Mapping[str, str]) -> Iterator[str]:
    """Names with their reasons, one line per reason: the first name, and how many more share it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, group in names.items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"{escaped(group[0])}{more}: {escaped(reason)}"


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def shape(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
