"""A JSON file that is not trusted yet: a regular file, of bounded size, one object, no key twice."""

from pathlib import Path

from spp_fx.checkpoint.header import regular_file_size
from spp_fx.checkpoint.strict_json import parse_object
from spp_fx.errors import FormatError, SppFxError

MAX_JSON_BYTES = 100_000_000
"""No index, manifest or configuration of a real model comes near it."""


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object that a JSON file holds; see `strict_json.parse_object`.

    Raises:
        UsageError: there is no such file, or it is a folder, pipe, socket or device (none of which is opened).
        FormatError: it is larger than `max_bytes`, or not one JSON object.
    """
    if (size := regular_file_size(path)) > max_bytes:
        raise FormatError(f"{path}: is {size} bytes long, the limit is {max_bytes}; get it again")
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes)  # whatever the size has become meanwhile
    except OSError as error:
        raise SppFxError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(data, str(path))
