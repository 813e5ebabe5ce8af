"""JSON that no writer would write: mutations of a document that keep it JSON, nearly."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


class Pairs(list[tuple[Any, Any]]):
    """An object as its pairs, in which a key may come twice."""


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is."""

    text: str


DEEP = 100_000
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    -(2**63),
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1.5,
    1e308,
    Raw("1e400"),
    Raw("-0.0"),
    Raw("1.0"),
    Raw("1" * 5000),
    Raw("NaN"),
    Raw("-Infinity"),
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("[" * DEEP),
    Raw("[" + "0," * 200_000 + "0]"),
    Raw("{" + ",".join(f'"k{i}":{i}' for i in range(20_000)) + "}"),
    Raw('"\\ud800"'),
    Raw("tru"),
    "",
    ".",
    "a",
    "0",
    "\0",
    "\n\r\x1b[31m",
    "é\u202e",
    "x" * 300_000,
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..",
    "config.json",
    "sparsity.lock.json",
    [],
    Pairs(),
    [[]],
    ["a", "a"],
    [0, 0],
    [-1, 4],
    [2**62, 2**62],
)

Place = tuple[Any, Any]
"""A container and the index of something in it."""


def parse(text: str | bytes) -> Any:
    """A document with objects as `Pairs`."""
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    """The text of a document."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> list[Place]:
    """Every place in a document, in order."""
    found: list[Place] = []
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, list):
            found += [(each, index) for index in range(len(each))]
            stack += [item[1] for item in each] if isinstance(each, Pairs) else each
    return found


def get(place: Place) -> Any:
    container, index = place
    return container[index][1] if isinstance(container, Pairs) else container[index]


def put(place: Place, value: Any) -> None:
    container, index = place
    container[index] = (container[index][0], value) if isinstance(container, Pairs) else value


def _drop(rng: Random, document: Any, place: Place) -> None:
    del place[0][place[1]]


def _duplicate(rng: Random, document: Any, place: Place) -> None:
    container, index = place
    item = container[index]
    if isinstance(container, Pairs) and rng.random() < 0.5:
        item = (item[0], rng.choice(HOSTILE))
    container.insert(rng.randrange(len(container) + 1), item)


def _rename(rng: Random, document: Any, place: Place) -> None:
    container, index = place
    if isinstance(container, Pairs):
        keys = [key for key, _ in container] + [text for text in HOSTILE if isinstance(text, str)]
        container[index] = (rng.choice([*keys, Raw('"\\ud800"')]), container[index][1])
    else:
        _replace(rng, document, place)


def _replace(rng: Random, document: Any, place: Place) -> None:
    put(place, rng.choice(HOSTILE))


def _nudge(rng: Random, document: Any, place: Place) -> None:
    """A value near the one that was there."""
    value = get(place)
    if isinstance(value, bool) or value is None:
        put(place, not value)
    elif isinstance(value, int):
        put(place, rng.choice([value + 1, value - 1, 2 * value, -value, float(value), str(value), [value]]))
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        put(
            place,
            rng.choice(
                [value[:at] + value[at + 1 :], value[:at] + "0" + value[at + 1 :], value.upper(), value * 2]
            ),
        )
    elif isinstance(value, list):
        rng.shuffle(value)
    else:
        put(place, -value)


def _swap(rng: Random, document: Any, place: Place) -> None:
    other = rng.choice(places(document))
    first, second = get(place), get(other)
    if place[0] is not other[0] and (isinstance(first, list) or isinstance(second, list)):
        return _replace(rng, document, place)  # one might lie in the other
    put(place, second)
    put(other, first)
    return None


def _copy(rng: Random, document: Any, place: Place) -> None:
    put(place, parse(json.dumps("a")) if rng.random() < 0.1 else _plain(get(rng.choice(places(document)))))


def _plain(value: Any) -> Any:
    return Raw(dump(value)) if isinstance(value, list) else value


def _wrap(rng: Random, document: Any, place: Place) -> None:
    text = dump(get(place))
    depth = rng.choice([1, 2, 900, 5000])
    put(place, Raw("[" * depth + text + "]" * depth))


OPERATIONS: tuple[Callable[[Random, Any, Place], None], ...] = (
    _drop,
    _duplicate,
    _rename,
    _replace,
    _replace,
    _replace,
    _nudge,
    _nudge,
    _nudge,
    _swap,
    _copy,
    _wrap,
)


def mutate(rng: Random, text: str | bytes) -> tuple[str, str]:
    """A changed document, and what was done to it."""
    document = parse(text)
    if rng.random() < 0.02 or not places(document):
        value = rng.choice(HOSTILE)
        return dump(value), "the whole document"
    operation = rng.choice(OPERATIONS)
    # Long lists of equal things would take all the attention: the depth is chosen before the place.
    place, value = None, document
    while isinstance(value, list) and value and (place is None or rng.random() < 0.75):
        place = (value, rng.randrange(len(value)))
        value = get(place)
    assert place is not None
    key = place[0][place[1]][0] if isinstance(place[0], Pairs) else place[1]
    operation(rng, document, place)
    return dump(document), f"{operation.__name__[1:]} at {str(key)[:60]!r}"
