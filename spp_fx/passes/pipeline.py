"""Pipelines: passes in a row, spelt `canonicalize,match{targets=q_proj,v_proj},inject{rank=16}`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from spp_fx.errors import PreconditionError, UsageError
from spp_fx.graph.program import Program
from spp_fx.options import check_options, default_of, parse_values
from spp_fx.passes.base import PASSES, Pass, PassReport
from spp_fx.registry import Registry

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
    parts = _print_options(item)
    return item.name + ("{" + ",".join(parts) + "}" if parts else "")


def _print_options(item: Any) -> list[str]:
    """The options of a pass, or of the method that it holds, but for those at their defaults."""
    parts: list[str] = []
    for field in fields(item):
        value, default = getattr(item, field.name), default_of(field)
        if "choices" in field.metadata:
            parts += [f"{field.name}={value.name}"] if value.name != default.name else []
            parts += _print_options(value)
        elif value != default:
            parts.append(f"{field.name}={_print_value(value)}")
    return parts


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
        program.rewritten(item)
        reports.append(report)
        if after is not None:
            after(item, report)
    return reports


def _parse_pass(name: str, body: str) -> Pass:
    cls, given = PASSES.find(name), _split(name, body)
    own = {field.name: field for field in fields(cls)}
    choice = next((field for field in own.values() if "choices" in field.metadata), None)
    others = {key: text for key, text in given.items() if key not in own}
    if choice is None and others:
        known = ", ".join(sorted(own)) or "none"
        raise UsageError(f"{name}: unknown option '{next(iter(others))}'; known: {known}")
    try:
        texts = {key: text for key, text in given.items() if own.get(key) not in (None, choice)}
        values = parse_values(cls, texts)
        if choice is not None:  # what is not an option of the pass is one of the method that was chosen
            registry: Registry[type[Any]] = choice.metadata["choices"]
            chosen: str = given[choice.name] if choice.name in given else default_of(choice).name
            check_options(registry, chosen, others)
            values[choice.name] = registry.find(chosen)(**parse_values(registry.find(chosen), others))
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error


def _split(name: str, body: str) -> dict[str, str]:
    """The options between braces: name -> text."""
    options: dict[str, str] = {}
    current: str | None = None
    for part in filter(None, map(str.strip, body.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            current = key.strip()
            if current in options:
                raise UsageError(f"{name}: option '{current}' is given twice")
            options[current] = value.strip()
        elif current is None:
            raise UsageError(f"{name}: '{part}' is not an option; write option=value")
        else:
            options[current] += f",{part}"
    return options


def _print_value(value: Any) -> str:
    single = str(value).lower() if isinstance(value, bool) else str(value)
    words = value if isinstance(value, tuple) else (single,)
    text = ",".join(words)
    if any(RESERVED & set(word) for word in words):
        raise UsageError(f"pipeline: '{text}' holds one of the characters {{ }} , = and cannot be spelt")
    return text
