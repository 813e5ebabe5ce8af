"""Errors a user can act on.

Every message says what is wrong, where (file, tensor, row, column) and how to mend it. The command
line prints the message alone and exits with `exit_code`; `--debug` shows the trace as well.
"""


class SppFxError(Exception):
    """Something does not hold or failed: exit code 1."""

    exit_code = 1


class UsageError(SppFxError):
    """The request itself is wrong (bad option, unknown name, existing output): exit code 2."""

    exit_code = 2


class FormatError(SppFxError):
    """A file is not what it claims to be: truncated, inconsistent or of an unknown form."""


class PatternError(SppFxError):
    """A weight does not hold the pattern it should; names the first row and column."""


class MaskError(SppFxError):
    """A mask is not the one it started as."""


class PreconditionError(SppFxError):
    """A pass was asked to run on a program that does not satisfy what it requires."""


class PostconditionError(SppFxError):
    """A pass left the program in a state it promised not to."""
