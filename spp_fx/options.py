"""Options as fields of dataclasses: how they are declared, read from text and checked.

The settings of a verb, a pass, an adapter method, a pruning criterion and an export format are dataclasses. A field's
type, default and metadata say what the command line, pipelines (`spp-fx opt`) and YAML files know of it: bool is a
flag, Literal a choice, a tuple of str may be repeated, `X | None` has no default, and a field without a default must
be given.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spp_fx.errors import UsageError
from spp_fx.registry import Registry


def option(
    default: Any,
    text: str,
    check: Callable[[Any], str | None] | None = None,
    *,
    flag: str | None = None,
    short: str | None = None,
    metavar: str | None = None,
    split: bool = False,
) -> Any:
    """A field that is an option.

    Args:
        default: `dataclasses.MISSING` where a value must be given.
        text: its help.
        check: what is wrong with a value, such as "must be at least 1"; None where nothing is.
        flag: its name on the command line, if that is not the field's.
        short: a second name, such as `-p`.
        metavar: what its help shows for the value.
        split: whether each value of a tuple is split at commas.
    """
    own = {"flag": flag, "short": short, "metavar": metavar, "split": split}
    return field(default=default, metadata={"help": text, "check": check} | own)


def at_least_one(value: float) -> str | None:
    return None if value >= 1 else "must be at least 1"


def positive(value: float) -> str | None:
    return None if 0 < value < inf else "must be positive and finite"


def not_negative(value: float) -> str | None:
    return None if 0 <= value < inf else "must be a finite number of at least 0"


def check_values(options: Any, owner: str = "") -> None:
    """UsageError if a field is not one of its choices or fails its check; fields that are None pass.

    Args:
        owner: what the message begins with; by default the option as the command line spells it.
    """
    hints = get_type_hints(type(options))
    for each in fields(options):
        value, kind = getattr(options, each.name), value_type(hints[each.name])
        if value is None:
            continue
        check = each.metadata.get("check")
        fault = check(value) if check else None
        if get_origin(kind) is Literal and value not in get_args(kind):
            fault = f"must be one of {', '.join(get_args(kind))}"
        if fault:
            flag = (each.metadata.get("flag") or each.name).replace("_", "-")
            raise UsageError(f"{f'{owner}: ' if owner else '--'}{flag} {fault}, got {value}")


def choice(registry: Registry[type[Any]], default: str) -> Any:
    """A field that holds an instance of one of a registry's classes; by default the one of that name."""
    return field(default_factory=lambda: registry.find(default)(), metadata={"choices": registry})


def default_of(each: Field[Any]) -> Any:
    """The value of a field that is not given."""
    return each.default_factory() if each.default_factory is not MISSING else each.default


def value_type(hint: Any) -> Any:
    """The type of a field's values: `int` for `int | None`."""
    if get_origin(hint) in (Union, UnionType):
        return next(each for each in get_args(hint) if each is not NoneType)
    return hint


def parse_values(cls: type[Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of a dataclass's fields as they are written: `true`, `0.5`, `q_proj,v_proj`.

    Raises:
        ValueError: a text is not a value of its field; says what the field takes.
    """
    hints = get_type_hints(cls)
    return {key: _parse(key, value_type(hints[key]), text) for key, text in texts.items()}


def _parse(key: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(text.split(","))
    takes = getattr(kind, "__name__", "")
    try:
        if get_origin(kind) is Literal:
            takes = ", ".join(get_args(kind))
            return {each: each for each in get_args(kind)}[text]
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"option {key} takes {takes}, got '{text}'") from None


def check_options(registry: Registry[Any], name: str, given: Iterable[str]) -> None:
    """UsageError for an option that the class of that name does not have; names the classes that have it."""
    known = _options(registry.find(name))
    for key in (each.replace("_", "-") for each in given):
        if key not in known:
            owners = [other for other in sorted(registry) if key in _options(registry[other])]
            raise UsageError(
                f"{name} has no option {key}; it has: {', '.join(known) or 'none'}"
                + (f"; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "")
            )


def _options(cls: type[Any]) -> list[str]:
    return sorted(each.name.replace("_", "-") for each in fields(cls))
