"""One linear layer, dense and packed, at many token counts."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from common import packing, timing
from spp_fx.runtime.trust import make_weight

LLAMAS: dict[str, dict[str, tuple[int, int]]] = {
    "1B": {"q/o": (2048, 2048), "k/v": (512, 2048), "gate/up": (8192, 2048), "down": (2048, 8192)},
    "7B": {"q/k/v/o": (4096, 4096), "gate/up": (11008, 4096), "down": (4096, 11008)},
    "70B": {"q/o": (8192, 8192), "k/v": (1024, 8192), "gate/up": (28672, 8192), "down": (8192, 28672)},
}
"""(out, in) of the projections of Llama 3.2 1B, Llama 2 7B and Llama 2 70B."""
PAYS = 1.05
"""From this ratio to the dense time on a form is called worth while."""
AHEAD = 2_000_000
"""GPU cycles slept before each timed call, about a millisecond, in which the host queues all of it."""


def measure(
    layer: str, shape: tuple[int, int], dtype: torch.dtype, tokens: list[int], repeats: int, device: torch.device,
    sm: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """What was checked of a layer's packs, and the times of every form at every token count."""
    weight = packing.sparse_weight(*shape, dtype, device)
    checks: dict[str, Any] = {"layer": layer, "shape": list(shape)}
    weights: dict[str, Tensor] = {"dense": weight}
    for layout in packing.FORMATS:
        site, library = packing.packed_site(layer, weight, layout, sm), packing.library(layout, device)
        found = packing.decide_quietly([site], library)[layer]
        checks[layout] = {"library": library.name, "runs": found.form, "reason": found.reason}
        # A CUTLASS weight that torch packs anew is cuSPARSELt's, which is timed already.
        if found.form == "packed" or (found.form == "repacked" and layout == "cusparselt"):
            weights[packing.form_name(layout, device)] = make_weight(site, found.form, library)
        if layout == "cusparselt" and device.type == "cuda" and site.unpacked is None:
            checks["bytes"] = _library_bytes(weight, site.parts()["packed"])
    results = [_times(layer, shape, dtype, count, weights, repeats, device) for count in tokens]
    return checks, results


def _library_bytes(weight: Tensor, packed: Tensor) -> dict[str, Any]:
    """Our pack against the one that cuSPARSELt makes of the same weight: the proof of the metadata's order."""
    try:
        theirs = torch._cslt_compress(weight)
    except RuntimeError as error:
        return {"same": None, "reason": str(error).partition(". ")[0].splitlines()[0]}
    return packing.first_difference(packed, theirs, values=weight.numel() // 2 * weight.itemsize)


def _times(
    layer: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int, weights: dict[str, Tensor], repeats: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype)

    def run(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: linear(x, weight)

    runs = {form: run(weight) for form, weight in weights.items()}
    with torch.inference_mode():
        times = cuda_times(runs, repeats) if device.type == "cuda" else timing.interleaved(runs, repeats)
    middle = {form: median(values) for form, values in times.items()}
    return {
        "layer": layer,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "milliseconds": {form: round(value, 5) for form, value in middle.items()},
        "times_faster_than_dense": {
            form: round(middle["dense"] / value, 3) for form, value in middle.items() if form != "dense"
        },
    }


def cuda_times(
    runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of GPU time, runs taking turns; the L2 cache is overwritten before each."""
    size = max(2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 64 << 20)
    flush = torch.empty(size, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(start.elapsed_time(end))
    return times


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """How many times faster than dense each form is, a line for each layer, a column for each token count."""
    counts = sorted({case["tokens"] for case in results})
    yield "times faster than dense".ljust(44) + "".join(f"{count:>7}" for count in counts)
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for case in results:
        for form, ratio in case["times_faster_than_dense"].items():
            label = f"{case['layer']} {case['shape'][0]} x {case['shape'][1]}"
            rows.setdefault((label, form), {})[case["tokens"]] = ratio
    for (label, form), ratios in rows.items():
        cells = "".join(f"{ratios[count]:7.2f}" if count in ratios else "      -" for count in counts)
        yield f"{label} {form}".ljust(44) + cells
    for (label, form), ratios in rows.items():
        paying = [str(count) for count, ratio in sorted(ratios.items()) if ratio >= PAYS]
        verdict = f"pays at {', '.join(paying)} tokens" if paying else "pays at no token count"
        yield f"{label} {form}: {verdict}"
