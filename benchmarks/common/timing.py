"""Times of several ways to do one thing, taken in turn so that a slow minute hits them all."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    sync: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each run, `repeats` times, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            if sync:
                sync()
            start = time.perf_counter()
            run()
            if sync:
                sync()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratios(times: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Median of each over the median of the reference."""
    base = median(times[reference])
    return {name: round(median(values) / base, 3) for name, values in times.items()}


def cpu_peak(run: Callable[[], object]) -> int:
    """Bytes that a run held at most beyond what was there before, as torch's CPU allocator saw it."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cuda_peak(run: Callable[[], object]) -> int:
    """The same on the current CUDA device."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
