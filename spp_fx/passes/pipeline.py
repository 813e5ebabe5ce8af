"""Pipelines: passes in a row, spelt `canonicalize,match{targets=q_proj,v_proj},inject{rank=16}`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from spp_fx.errors import PreconditionError, SppFxError, UsageError
from spp_fx.graph.program import Program
from spp_fx.passes.base import Pass, PassReport, find_pass

ITEM = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
RESERVED = set("{},=")


def parse_pipeline(text: str) -> list[Pass]:
    """Passes from their spelling.

    Inside braces, a comma followed by a word without `=` continues the list before it:
    `match{targets=q_proj,v_proj}`.

    Raises:
        UsageError: names the place that cannot be read, or the pass or option that is unknown.
    """
    passes: list[Pass] = []
    position = 0
    while position < len(text):
        item = ITEM.match(text, position)
        if item is None:
            raise UsageError(
                f"pipeline: cannot read '{text[position : position + 30]}' at character {position}; "
                "write name{option=value,...},name,..."
            )
        passes.append(_parse_pass(item[1], item[2] or ""))
        position = item.end()
    if not passes or text.rstrip().endswith(","):
        raise UsageError("pipeline: a pass is missing; write name{option=value,...},name,...")
    return passes


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The spelling of passes; options at their defaults are left out."""
    return ",".join(map(print_pass, passes))


def print_pass(item: Pass) -> str:
    """The spelling of one pass."""
    given = {f.name: getattr(item, f.name) for f in fields(item) if getattr(item, f.name) != _default(f)}
    given |= given.pop("options", {})
    parts = [f"{name}={_print_value(value)}" for name, value in given.items()]
    return item.name + ("{" + ",".join(parts) + "}" if parts else "")


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    after: Callable[[Pass, PassReport], None] | None = None,
) -> list[PassReport]:
    """Run passes in order, each between its `requires` and `ensures`; their reports, in the same order.

    Args:
        program: rewritten in place.
        passes: in order.
        after: called with every pass and its report once it ran.

    Raises:
        SppFxError: as the pass raised it, with the passes that had run before.
    """
    reports: list[PassReport] = []
    for item in passes:
        try:
            item.requires(program)
            report = item.apply(program)
            item.ensures(program)
        except PreconditionError as error:
            before = ", ".join(program.history) or "none"
            raise PreconditionError(f"{error} (passes that ran before: {before})") from error
        program.history.append(print_pass(item))
        reports.append(report)
        if after is not None:
            after(item, report)
    return reports


def _parse_pass(name: str, body: str) -> Pass:
    cls, given = find_pass(name), _split(name, body)
    own = _fields(cls)
    own.pop("options", None)
    values = {key: _parse_value(name, key, own[key], given[key]) for key in given if key in own}
    others = [key for key in given if key not in own]
    chosen = cls.chosen(values) if others else None
    types = _fields(chosen) if chosen else {}
    if unknown := [key for key in others if key not in types]:
        known = ", ".join(sorted(own.keys() | types.keys())) or "none"
        raise UsageError(f"{name}: unknown option '{unknown[0]}'; known: {known}")
    options = {key: _parse_value(name, key, types[key], given[key]) for key in others}
    try:
        return cls(**values, **({"options": options} if options else {}))
    except SppFxError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error


def _split(name: str, body: str) -> dict[str, list[str]]:
    """What stands between the braces: the words given for each option."""
    given: dict[str, list[str]] = {}
    current: str | None = None
    for part in filter(None, (each.strip() for each in body.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            current = key.strip()
            if current in given:
                raise UsageError(f"{name}: option '{current}' is given twice")
            given[current] = [value.strip()]
        elif current is None:
            raise UsageError(f"{name}: '{part}' is not an option; write option=value")
        else:
            given[current].append(part)
    return given


def _fields(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    types = get_type_hints(cls)
    return {field.name: types[field.name] for field in fields(cls)}


def _parse_value(name: str, key: str, kind: Any, values: list[str]) -> Any:
    if get_origin(kind) is tuple and get_args(kind) == (str, ...):
        return tuple(values)
    text = ",".join(values)
    if get_origin(kind) is UnionType:  # an option that may be left to what it is for
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{name}: option {key} takes {kind.__name__}, got '{text}'") from error


def _print_value(value: Any) -> str:
    text = (
        ",".join(value)
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
    words = value if isinstance(value, tuple) else (text,)
    if any(RESERVED & set(word) for word in words):
        raise UsageError(f"pipeline: '{text}' holds one of the characters {{ }} , = and cannot be spelt")
    return text


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
