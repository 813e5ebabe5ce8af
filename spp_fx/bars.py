"""Bars of progress on stderr, for a terminal; rich is imported with them, and a quiet command does without both."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def bytes_bar(title: str) -> Generator[Callable[[str, int], None], None, None]:
    """A bar that counts bytes; what it yields is called with a tensor's name and size."""
    with _bar(DownloadColumn()) as progress:
        task = progress.add_task(title, total=None, item="")
        done = 0

        def tick(what: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress.update(task, completed=done, item=what)

        yield tick


@contextmanager
def steps_bar(title: str, total: int | None) -> Generator[Callable[[int, int | None, str], None], None, None]:
    """A bar that counts steps and tells the time left; what it yields takes steps done, of how many, and a word."""
    with _bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=total, item="")

        def update(done: int, known: int | None, item: str) -> None:
            if known is not None:
                progress.update(task, total=known)
            progress.update(task, completed=done, item=item)

        yield update


@contextmanager
def _bar(*columns: ProgressColumn) -> Generator[Progress, None, None]:
    title, item = TextColumn("{task.description}"), TextColumn("{task.fields[item]}")
    console = Console(stderr=True, highlight=False)
    with Progress(title, *columns, item, console=console, transient=True) as progress:
        yield progress
