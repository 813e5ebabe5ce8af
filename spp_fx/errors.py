"""Errors a user can act on.

Every message says what is wrong, where (file, tensor, row, column) and how to mend it. The command
line prints the message alone and exits with `exit_code`; `--debug` shows the trace as well.
"""

_LONGEST = 2000


def escaped(text: str) -> str:
    """Text that a terminal, a log, an annotation or XML takes as one line, whatever names of files say in it.

    What is not printable (control characters, line ends, marks that turn the direction of writing, lone
    surrogates) is escaped as Python would.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable(text: str) -> str:
    """As `escaped`; what is longer than 2,000 characters is cut."""
    line = escaped(text[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


class SppFxError(Exception):
    """Something does not hold or failed: exit code 1. The message is made `printable`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(SppFxError):
    """The request itself is wrong (bad option, unknown name, existing output): exit code 2."""

    exit_code = 2


class FormatError(SppFxError):
    """A file is not what it claims to be: truncated, inconsistent or of an unknown form."""


class WriteError(SppFxError):
    """A system refused something while a file was written; its cause, an OSError, says what."""


class PatternError(SppFxError):
    """A weight does not hold the pattern it should; names the first row and column."""


class MaskError(SppFxError):
    """A mask is not the one it started as."""


class PreconditionError(SppFxError):
    """A pass was asked to run on a program that does not satisfy what it requires."""


class PostconditionError(SppFxError):
    """A pass left the program in a state it promised not to."""
