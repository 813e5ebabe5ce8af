"""Options as fields of dataclasses: how they are declared, read from text and checked.

The settings of a verb, a pass, an adapter method, a pruning criterion and an export format are dataclasses. Their
fields are what the command line, pipelines (`spp-fx opt`) and YAML files know as options: the type, the default and
the metadata of a field say everything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spp_fx.errors import UsageError
from spp_fx.registry import Registry

T = TypeVar("T")


def option(
    default: Any,
    text: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    least: int | None = None,
    split: bool = False,
) -> Any:
    """A field of a dataclass that is an option: a str, int, float, bool, Path, Literal or tuple of str.

    Args:
        default: None for an option without one; `dataclasses.MISSING` for an option that must be given.
        text: its help.
        flag: its name on the command line; by default the field's, with dashes.
        metavar: what the help shows for the value.
        least: the smallest number it takes.
        split: whether each value of a tuple is split at commas.
    """
    metadata = {"help": text, "flag": flag, "metavar": metavar, "least": least, "split": split}
    return field(default=default, metadata=metadata)


def choice(registry: Registry[type[Any]], default: str) -> Any:
    """A field that holds an instance of one of a registry's classes; by default the one of that name."""
    return field(default_factory=lambda: registry.find(default)(), metadata={"choices": registry})


def flag_of(each: Field[Any]) -> str:
    """The name of an option on the command line, without its dashes in front."""
    return each.metadata.get("flag") or each.name.replace("_", "-")


def default_of(each: Field[Any]) -> Any:
    """The value of an option that is not given."""
    return each.default_factory() if each.default_factory is not MISSING else each.default


def value_type(hint: Any) -> Any:
    """The type of a field's values: `int` for `int | None`."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
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


def make(registry: Registry[type[T]], name: str, options: Mapping[str, Any]) -> T:
    """What a registry has under a name, made with its options.

    Raises:
        UsageError: an unknown name, or an option that belongs to others; names those.
    """
    cls = registry.find(name)
    check_options(registry, name, options)
    return cls(**options)


def check_options(registry: Registry[type[Any]], name: str, options: Iterable[str]) -> None:
    """UsageError for an option that what has the name does not have; names those that have it."""
    known = {each.name for each in fields(registry.find(name))}
    for key in options:
        if key not in known:
            owners = [other for other in sorted(registry) if key in {f.name for f in fields(registry[other])}]
            raise UsageError(
                f"{name} has no option {_dashed(key)}; it has: {', '.join(map(_dashed, sorted(known))) or 'none'}"
                + (f"; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "")
            )


def option_names(registry: Registry[type[Any]]) -> list[str]:
    """The options of all that a registry has."""
    return sorted({each.name for cls in registry.values() for each in fields(cls)})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
