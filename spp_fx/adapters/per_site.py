"""Options of a method site by site: `rank:down_proj@32`, and the ranks that a budget of parameters gives."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf, prod
from typing import Any

from spp_fx.adapters.method import Method, option_types
from spp_fx.errors import FormatError, UsageError
from spp_fx.options import parse_values
from spp_fx.sparsity.weights import is_target, module_name

PATTERN = "_pattern"
"""What follows an option's name in adapter_config.json, as in PEFT's `rank_pattern`."""


def numeric_options(method: type[Method]) -> dict[str, type]:
    """The options that may differ between sites, int or float, by name."""
    return {name: kind for name, kind in option_types(method).items() if kind in (int, float)}


@dataclass(frozen=True)
class Override:
    """Another value of one option, for the sites that `target` names."""

    option: str
    target: str
    value: float

    def gives(self, site: str, method: Method) -> bool:
        """Whether a site with this method has the value from here."""
        return is_target(site, self.target) and getattr(method, self.option) == self.value

    def __str__(self) -> str:
        return f"{self.option}:{self.target}@{self.value!r}"


def parse_override(method: Method, text: str) -> Override:
    """Read OPTION:NAME@VALUE.

    Raises:
        UsageError: it is not of that form, the option is not a number, or the method refuses the value.
    """
    key, colon, rest = text.partition(":")
    target, at, value = rest.rpartition("@")
    option, numeric = key.replace("-", "_"), numeric_options(type(method))
    if not (colon and at and target and value):
        raise UsageError(f"'{text}' is not an override; write OPTION:NAME@VALUE, such as rank:down_proj@32")
    if option not in numeric:
        raise UsageError(
            f"'{text}': {method.name} has no number {key} to set site by site; it has: {', '.join(numeric) or 'none'}"
        )
    try:
        rule = Override(option, target, parse_values(type(method), {option: value})[option])
    except ValueError as error:
        raise UsageError(f"'{text}': {error}") from error
    replace(method, **{option: rule.value})
    return rule


def method_by_site(method: Method, overrides: Sequence[str], sites: Iterable[str]) -> dict[str, Method]:
    """The method of each site, with the values that overrides give it; for one option the last that fits counts.

    Args:
        overrides: OPTION:NAME@VALUE; NAME is the last words of a module's name or a glob over the whole name.
        sites: their names.

    Raises:
        UsageError: an override cannot be read, names no site, or has a value that the method refuses.
    """
    names = list(sites)
    rules = [parse_override(method, text) for text in overrides]
    for rule in rules:
        if not any(is_target(name, rule.target) for name in names):
            words = sorted({module_name(name).rpartition(".")[2] for name in names})
            raise UsageError(
                f"{rule.option} {rule.target}@{rule.value}: '{rule.target}' names no site; "
                f"there are: {', '.join(words)}"
            )
    found: dict[str, Method] = {}
    for name in names:
        own = {rule.option: rule.value for rule in rules if is_target(name, rule.target)}
        found[name] = replace(method, **own) if own else method
    return found


def to_patterns(method: Method, by_site: Mapping[str, Method]) -> dict[str, dict[str, float]]:
    """What adapter_config.json holds of options that differ: `rank_pattern: {module: value}`."""
    patterns: dict[str, dict[str, float]] = {}
    for option in numeric_options(type(method)):
        default = getattr(method, option)
        values = {module_name(site): getattr(own, option) for site, own in by_site.items()}
        if different := {name: value for name, value in values.items() if value != default}:
            patterns[option + PATTERN] = different
    return patterns


def from_patterns(method: Method, sites: Iterable[str], config: Mapping[str, Any]) -> dict[str, Method]:
    """The method of each site; the inverse of `to_patterns`.

    Args:
        config: keys of adapter_config.json; those that end in `_pattern` are read.

    Raises:
        FormatError: an option that the method does not have, a module that is not a site, a value of another type.
        UsageError: a value that the method refuses.
    """
    numeric = numeric_options(type(method))
    modules = {module_name(site): site for site in sites}
    own: dict[str, dict[str, float]] = {site: {} for site in modules.values()}
    for key, values in config.items():
        if not key.endswith(PATTERN) or not values:  # PEFT writes empty ones
            continue
        option = key.removesuffix(PATTERN)
        if option not in numeric:
            raise FormatError(f"{key}: {method.name} has no number {option} that differs between sites")
        if not isinstance(values, dict):
            raise FormatError(f"{key}: must be an object of modules and their values")
        for module, value in values.items():
            if module not in modules:
                raise FormatError(f"{key}: {module} is not one of the adapter's sites")
            kinds = (int,) if numeric[option] is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise FormatError(f"{key}: {module}: must be {numeric[option].__name__}, got {value!r}")
            own[modules[module]][option] = numeric[option](value)
    return {site: replace(method, **values) if values else method for site, values in own.items()}


def as_overrides(method: Method, by_site: Mapping[str, Method]) -> tuple[str, ...]:
    """Overrides that give each site its method, for the pass `inject`.

    A site's name may be the end of another's: every site is named, and the longest names last.
    """
    return tuple(
        str(Override(option, site, getattr(by_site[site], option)))
        for option in numeric_options(type(method))
        if any(getattr(own, option) != getattr(method, option) for own in by_site.values())
        for site in sorted(by_site, key=len)
    )


def parse_budget(text: str | int, total: int) -> int:
    """A number of parameters: `0.3%` of `total`, or a count.

    Raises:
        UsageError: it is neither, or less than one parameter.
    """
    number = str(text).strip()
    try:
        count = float(number[:-1]) * total / 100 if number.endswith("%") else int(number)
    except ValueError:
        count = 0.0
    if not (1 <= count < inf):
        raise UsageError(
            f"--budget takes a share of the model's parameters such as 0.3%, or a count, got '{text}'"
        )
    return int(count)


RANK = "rank"


def check_ranked(method: Method) -> None:
    """UsageError for a method that has no rank to choose."""
    if numeric_options(type(method)).get(RANK) is not int:
        raise UsageError(f"--budget chooses ranks, and {method.name} has none; leave it out")


def rank_of(method: Method) -> int:
    return getattr(method, RANK)


def with_rank(method: Method, rank: int) -> Method:
    return replace(method, **{RANK: rank})


def spread(
    methods: Mapping[str, Method],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, float],
    budget: int,
) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods with ranks in proportion to the sites' weights, as large as a budget lets them be.

    Ranks grow step by step, from one that a site takes to the next, in the order of rank / weight and then of the
    sites. A step that does not fit ends the growth of its site. So no rank can be raised alone.

    Args:
        methods: of the sites, each with an option `rank`.
        shapes: of the same sites.
        weights: at least 0; a site of weight 0 gets no rank.
        budget: parameters for all factors together.

    Returns:
        The method of each site that has a rank, and why the others have none.

    Raises:
        UsageError: no site gets a rank.
    """
    steps: list[tuple[float, int, str, Method, int]] = []
    for index, (name, method) in enumerate(methods.items()):
        before = 0
        for own, size in _ladder(with_rank(method, 1), shapes[name], budget) if weights[name] > 0 else ():
            steps.append((rank_of(own) / weights[name], index, name, own, size - before))
            before = size
    found: dict[str, Method] = {}
    full: set[str] = set()
    left = budget
    for _, _, name, own, more in sorted(steps, key=lambda step: step[:2]):
        if name in full or more > left:
            full.add(name)
            continue
        found[name] = own
        left -= more
    if not found:
        least = min((more for *_, more in steps), default=0)
        raise UsageError(
            f"--budget: {budget:,} parameters give no site a rank"
            + (f"; the smallest step takes {least:,}" if least else "")
        )
    refused = {
        name: f"the budget of {budget:,} parameters leaves no rank for it"
        if weights[name] > 0
        else "its share of the budget is 0"
        for name in methods
        if name not in found
    }
    return {name: found[name] for name in methods if name in found}, refused


def unspent(
    methods: Mapping[str, Method],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, float],
    chosen: Mapping[str, Method],
) -> str:
    """Why `spread` left the rest of a budget: the smallest step to a further rank, which is more, or that none is left.

    Args:
        methods, shapes, weights: as `spread` got them.
        chosen: as it gave them.
    """
    steps: list[int] = []
    for name, method in methods.items():
        own = chosen.get(name)
        used = size_of(own, shapes[name]) if own else 0
        if own or weights[name] > 0:
            ladder = _ladder(with_rank(method, 1), shapes[name], 1 << 62)
            steps += [size - used for _, size in ladder if size > used][:1]
    return (
        f"the next rank of a weight takes {min(steps):,} more"
        if steps
        else "every weight has its highest rank"
    )


def size_of(method: Method, shape: tuple[int, ...]) -> int:
    """How many parameters the factors of a site have."""
    return sum(spec.numel for spec in method.factors(shape).values())


@cache
def _ladder(method: Method, shape: tuple[int, ...], budget: int) -> Sequence[tuple[Method, int]]:
    """The ranks that a site takes, with their sizes.

    After the first one, only those within the budget, and not of more numbers than the weight itself has.
    """
    found: list[tuple[Method, int]] = []
    for rank in range(1, shape[-2] + 1):
        own = with_rank(method, rank)
        size = size_of(own, shape) if own.refusal(shape) is None else 0
        if found and size > min(budget, prod(shape)):
            break
        if size:
            found.append((own, size))
    return found
