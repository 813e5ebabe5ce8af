"""The learning rate of a run: what its method suggests, and short trials around that."""

from collections.abc import Callable, Sized
from math import ceil, exp2, inf, isfinite, prod
from pathlib import Path
from statistics import median
from typing import NamedTuple

from accelerate import PartialState

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.method import Run
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.program import Program
from spp_fx.storage.folder import ModelFolder
from spp_fx.verbs.settings import TrainSettings

FEWEST_STEPS = 32
"""A shorter run is its own trial, at the suggested rate."""
TRIAL_SHARE, SHORTEST_TRIAL, LONGEST_TRIAL = 1 / 5, 10, 24
MOST_TRIALS = 7
LOWEST = 4.0**-6
"""Multiple of the suggestion that is not lowered further: it hardly moves a factor."""
SPREAD_NUMBERS = 1 << 18


def steps_of(rows: Sized, settings: TrainSettings) -> int:
    """Optimizer steps of a run, over all processes."""
    if settings.steps:
        return settings.steps
    batches = ceil(len(rows) / (settings.batch_size * PartialState().num_processes))
    return max(1, ceil((settings.epochs or 3.0) * ceil(batches / settings.accumulate)))


def suggested(adapter: Path, program: Program, model: Path) -> Callable[[int], float]:
    """The rate for a number of steps: the median of those that the methods of the sites suggest."""
    base, matrices = open_model(model), AdapterFolder.open(adapter).matrices
    sites = [
        (method, program.sites[name].in_features, spread(base, matrices[name][0].tensor))
        for name, method in program.adapters.items()
    ]
    return lambda steps: median(method.rate(Run(steps, width, size)) for method, width, size in sites)


def spread(base: ModelFolder, tensor: str) -> float:
    """The root mean square of a stored weight's non-zeros, 1 where it has none.

    Of a large weight 2^18 numbers of its middle rows stand for all: a rate needs no more digits.
    """
    _, info = base.info(tensor)
    rows = info.shape[0]
    some = min(rows, max(1, SPREAD_NUMBERS * rows // prod(info.shape)))
    start = (rows - some) // 2
    values = base.read_rows(tensor, start, start + some).double()
    return float(values[values != 0].square().mean().sqrt()) if values.any() else 1.0


def trial_steps(steps: int) -> int:
    """Steps of each trial before a run of `steps`."""
    if steps < FEWEST_STEPS:
        return steps
    return min(max(round(steps * TRIAL_SHARE), SHORTEST_TRIAL), LONGEST_TRIAL)


def warmup_share(warmup: float, steps: int) -> float:
    """The warmup of a run of so many steps as a share of them, below 1; a trial warms up for the same share."""
    return warmup if warmup < 1 else min(warmup / steps, 0.99)


class Trial(NamedTuple):
    """A short run.

    Attributes:
        loss: at its end, while training; infinite where it diverged.
        gain: how far it brought the loss of some training rows below that of the start.
    """

    lr: float
    loss: float
    gain: float


def find(trial: Callable[[float], Trial], searches: bool) -> tuple[float, list[Trial]]:
    """The multiple of the suggested rate for a run, and the trials of it.

    Where the best trial ended above the start, lower rates are tried, by a factor of 4, until one does not: a start
    that is good already needs smaller steps than the suggestion knows of.

    Args:
        trial: runs one at a multiple.
        searches: whether to look for the best multiple, see `best_multiple`; otherwise it is 1 unless that is too much.
    """
    tried: dict[float, Trial] = {}

    def at(multiple: float) -> Trial:
        if multiple not in tried:
            tried[multiple] = trial(multiple)
        return tried[multiple]

    found = best_multiple(lambda multiple: at(multiple).loss) if searches else 1.0
    nearest = min(tried, key=lambda multiple: (tried[multiple].loss, multiple), default=found)
    while not at(nearest).gain >= 0 and nearest > LOWEST:
        found = nearest = nearest / 4
    return found, list(tried.values())


def best_multiple(loss: Callable[[float], float], most: int = MOST_TRIALS) -> float:
    """The multiple of the suggested rate at which a trial's loss is lowest.

    Multiples a factor of 2 apart are tried from 1 on, towards the lower loss, until the lowest has a higher one on
    each side, or `most` are tried; then the lowest point of the parabola through these three is taken.

    Args:
        loss: of a trial at a multiple; not finite where it diverges.
    """
    tried: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in tried:
            found = loss(exp2(power))
            tried[power] = found if isfinite(found) else inf
        return tried[power]

    best = 0
    while at(best) == inf and len(tried) < most:
        best -= 1
    while len(tried) < most:
        lower = min((best - 1, best + 1), key=at)
        if at(lower) >= at(best):
            break
        best = lower
    left, here, right = (tried.get(power, inf) for power in (best - 1, best, best + 1))
    if not isfinite(left + here + right) or left + right <= 2 * here:
        return exp2(best)
    return exp2(best + (left - right) / (2 * (left - 2 * here + right)))


def carried_over(short: float, whole: float, left: float) -> float:
    """The suggestion for a whole run, corrected by what trials showed.

    A longer run takes a lower rate to average out the noise of its steps. Where the loss itself goes to zero, as the
    divergence from a teacher that can be imitated, so does the noise, and the rate stays.

    Args:
        short, whole: suggestions for a trial and for the run.
        left: the share of the untrained loss that the best trial ended with.
    """
    share = min(max(left, 0.0), 1.0) if isfinite(left) else 1.0
    return short ** (1 - share) * whole**share


def rounded(rate: float) -> float:
    """Two significant digits: more would claim what the trials cannot know."""
    return float(f"{rate:.1e}")
