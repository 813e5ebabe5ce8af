"""JSON from untrusted files: a regular file of bounded size, one object, no key twice."""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

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


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        UsageError: there is no such file, or it is a folder, pipe, socket or device (none of which is opened).
        FormatError: it is larger than `max_bytes`.
        SppFxError: it cannot be read.
    """
    if (size := regular_file_size(path)) > max_bytes:
        raise FormatError(f"{path}: is {size} bytes long, the limit is {max_bytes}; get it again")
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes)  # whatever the size has become meanwhile
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object that a JSON file holds; raises what `read_bytes` and `parse_object` raise."""
    return parse_object(read_bytes(path, max_bytes), str(path))


class StrictModel(BaseModel):
    """An immutable object of a file: types are not converted, and an unknown key is an error."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def parse_model(model: type[Model], data: bytes, where: str) -> Model:
    """Validate a JSON object against a pydantic model.

    Raises:
        FormatError: as `parse_object`, or a field is wrong; names the first one.
    """
    parse_object(data, where)  # pydantic does not see a key that occurs twice
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """The first wrong field and what is wrong with it, in at most 400 characters."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    text = fault["msg"].removeprefix("Value error, ")
    return f"{location(fault['loc'])}: {text}"[:400] if fault["loc"] else text[:400]


def location(path: tuple[int | str, ...]) -> str:
    """A path of keys and indices as `sites[0].name`, in at most 200 characters."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")[:200]
