"""JSON from untrusted files: a regular file of bounded size, one object, no key twice."""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import cast

from spp_fx.errors import FormatError, SppFxError, UsageError

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxlong = 60


def shown(value: object, limit: int = 120) -> str:
    """`value` quoted for an error message: control characters escaped, cut after `limit` characters."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else repr(value[:limit]) + "..."
    quoted = _SHORT.repr(value)  # never spells out a list of millions
    return quoted if len(quoted) <= limit else quoted[:limit] + "..."


def is_unicode(text: str) -> bool:
    """Whether `text` has no unpaired surrogate, which JSON allows and UTF-8 does not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_object(data: bytes, where: str) -> dict[str, object]:
    """The JSON object that `data` holds.

    Args:
        data: UTF-8 text.
        where: file and part, put before every message.

    Raises:
        FormatError: not UTF-8, not JSON, not an object, a key twice in one object, NaN or Infinity,
            nested too deep, or a number of thousands of digits.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"{where}: the key {shown(key)} occurs twice; write the file again")
                seen.add(key)
        return result

    def constant(word: str) -> object:
        raise FormatError(f"{where}: {word} is not JSON; write the file again")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise FormatError(f"{where}: nested too deeply; get it again") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits
        raise FormatError(f"{where}: not valid JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: holds {shown(value)}, expected a JSON object")
    return cast("dict[str, object]", value)


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file, behind symbolic links.

    Raises:
        UsageError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is not a regular file")
    return status.st_size


MAX_JSON_BYTES = 100_000_000
"""Far more than any index, manifest or configuration of a real model has."""


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object that a JSON file holds; see `parse_object`.

    Raises:
        UsageError: there is no such file, or it is a folder, pipe, socket or device (none of which is opened).
        FormatError: it is larger than `max_bytes`, or not a JSON object.
    """
    if (size := regular_file_size(path)) > max_bytes:
        raise FormatError(f"{path}: is {size} bytes long, the limit is {max_bytes}; get it again")
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes)  # the file may have grown meanwhile
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(data, str(path))
