"""Errors a user can act on.

Every message says what is wrong, where (file, tensor, row, column) and how to fix it. The command
line prints the message and exits with `exit_code`; `--debug` shows the traceback as well.
"""

from collections.abc import Iterator

_LONGEST = 2000


def escaped(text: str) -> str:
    """Text in one line that is safe in a terminal, a log, an annotation and XML, whatever it quotes from files.

    Unprintable characters (control characters, line ends, bidirectional marks, unpaired surrogates) are escaped
    as in Python.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable(text: str) -> str:
    """As `escaped`, cut after 2,000 characters."""
    line = escaped(text[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def unreadable(error: OSError) -> str:
    """Why a file that the user named cannot be read, to follow its path."""
    return (
        "there is no such file"
        if isinstance(error, FileNotFoundError)
        else f"cannot be read: {error.strerror}"
    )


class SppFxError(Exception):
    """A check or an operation failed: exit code 1. The message is made `printable`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(SppFxError):
    """The command is wrong (bad option, unknown name, existing output): exit code 2."""

    exit_code = 2


class FormatError(SppFxError):
    """A file is not what it claims to be: truncated, inconsistent or of an unknown form."""


class WriteError(SppFxError):
    """A file could not be written; the cause is the OSError."""


class PatternError(SppFxError):
    """A weight does not hold the pattern it should; names the first row and column."""


class MaskError(SppFxError):
    """A mask changed."""


class PreconditionError(SppFxError):
    """A program does not satisfy what a pass requires."""


class PostconditionError(SppFxError):
    """A pass left a program in a state that it must not leave."""


def notes_of(error: BaseException) -> Iterator[str]:
    """The notes of an error, and those of what caused it."""
    cause: BaseException | None = error
    while cause is not None:
        yield from getattr(cause, "__notes__", ())
        cause = cause.__cause__
