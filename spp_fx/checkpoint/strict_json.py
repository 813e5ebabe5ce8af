"""JSON from files that are not trusted yet: one object, no key twice, no number JSON does not have."""

import json
import reprlib
from typing import cast

from spp_fx.errors import FormatError

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxlong = 60


def shown(value: object, limit: int = 120) -> str:
    """`value` quoted for an error message: control characters escaped, cut after `limit` characters."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else repr(value[:limit]) + "..."
    quoted = _SHORT.repr(value)  # never spells out a list of millions
    return quoted if len(quoted) <= limit else quoted[:limit] + "..."


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
        raise FormatError(f"{where}: nested too deep to be real; get the file again") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits
        raise FormatError(f"{where}: not valid JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: holds {shown(value)}, expected a JSON object")
    return cast("dict[str, object]", value)
