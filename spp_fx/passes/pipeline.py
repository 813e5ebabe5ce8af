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
    parts = [
        f"{field.name}={_print_value(getattr(item, field.name))}"
        for field in fields(item)
        if getattr(item, field.name) != _default(field)
    ]
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
    cls = find_pass(name)
    types = get_type_hints(cls)
    known = {field.name for field in fields(cls)}
    options: dict[str, list[str]] = {}
    current: str | None = None
    for part in filter(None, (piece.strip() for piece in body.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            current = key.strip()
            if current not in known:
                raise UsageError(
                    f"{name}: unknown option '{current}'; known: {', '.join(sorted(known)) or 'none'}"
                )
            if current in options:
                raise UsageError(f"{name}: option '{current}' is given twice")
            options[current] = [value.strip()]
        elif current is None:
            raise UsageError(f"{name}: '{part}' is no option; write option=value")
        else:
            options[current].append(part)
    try:
        return cls(**{key: _parse_value(name, key, types[key], values) for key, values in options.items()})
    except SppFxError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error


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
