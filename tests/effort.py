"""How much a test tries: a sample in `make test`, everything in `make nightly`."""

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings

NIGHTLY = "SPP_FX_NIGHTLY" in os.environ
SEED = int(
    os.environ.setdefault("SPP_FX_SEED", str(random.SystemRandom().randrange(2**32) if NIGHTLY else 0))
)
"""Of the tests that sample. One in `make test`, where a change and not luck decides; another every night."""


def examples(number: int) -> settings:
    """Hypothesis examples of a test: so many in `make test`, forty times as many at night."""
    return settings(max_examples=number * (40 if NIGHTLY else 1))


def covering(
    strength: int = 2, /, *, indirect: Sequence[str] = (), **factors: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrize by a covering array of some factors; the rest of their product runs at night.

    Every combination of values of any `strength` factors stands in a row of the array. Rows are taken from
    the product greedily, the one that adds most first, so that the array is the same in every run.
    """
    rows = covering_rows(strength, **factors)
    return pytest.mark.parametrize(
        tuple(factors),
        [pytest.param(*row.values[0], id=row.id, marks=row.marks) for row in rows],
        indirect=indirect,
    )


def covering_rows(strength: int = 2, /, **factors: Iterable[Any]) -> list[Any]:
    """The parameters of `covering` for a fixture, each a tuple of values."""
    values = [list(factor) for factor in factors.values()]
    product = list(itertools.product(*(range(len(factor)) for factor in values)))
    taken = _cover(product, min(strength, len(values)))
    rows: list[Any] = []
    for places in product:
        row = tuple(factor[place] for factor, place in zip(values, places, strict=True))
        name = "-".join(str(value).removeprefix("torch.") for value in row)
        rows.append(pytest.param(row, id=name, marks=[] if places in taken else [pytest.mark.nightly]))
    return rows


def nightly(*values: Any, **options: Any) -> Any:
    """A parameter that runs at night only."""
    return pytest.param(*values, marks=pytest.mark.nightly, **options)


def _cover(product: Sequence[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    chosen = list(itertools.combinations(range(len(product[0])), strength))

    def parts(row: tuple[int, ...]) -> set[tuple[Any, ...]]:
        return {(places, tuple(row[place] for place in places)) for places in chosen}

    missing = set[tuple[Any, ...]]().union(*map(parts, product))
    taken: set[tuple[int, ...]] = set()
    used: Counter[tuple[int, int]] = Counter()
    while missing:
        # Of rows that add as many, the one whose values were used least.
        best = max(
            product, key=lambda row: (len(parts(row) & missing), -sum(used[pair] for pair in enumerate(row)))
        )
        taken.add(best)
        used.update(enumerate(best))
        missing -= parts(best)
    return taken
