"""How long work tells what it has done."""

from collections.abc import Callable

Tick = Callable[[str, int], None]
"""Called with what was done and how many bytes it covered, so that a caller can show progress."""


def no_tick(what: str, nbytes: int) -> None:
    """Show nothing."""
