"""One training step of one 2:4 linear, by every way."""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from common import rivals, timing
from spp_fx.adapters.method import Method, make_method
from spp_fx.adapters.op import op_options, ops_of
from spp_fx.adapters.rows import PACKINGS

REFERENCE = "lors"
Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def op(overload: Callable[..., Tensor], method: Method, *packed: Tensor) -> Way:
    """An op as a way, which takes a factor that follows W's rows first. With `packed`, it does not look at W."""

    def way(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
        specs = method.factors(tuple(weight.shape))
        given = dict(
            zip(sorted(specs, key=lambda name: specs[name].rows is None), (first, second), strict=True)
        )
        factors = [given[name] for name in specs]
        return overload(x, *(packed or (weight,)), *factors, None, None, *op_options(method), 0.0)

    return way


RIVALS: dict[str, Way] = {
    "lors": rivals.lors,
    "sqft": rivals.sqft,
    "sqft_checkpoint": rivals.sqft_checkpoint,
    "hira": rivals.hira,
}
LOW_RANK = ("sqft", "lors", "hira")
"""Our methods of a low-rank product, whose factors are (m, r) and (r, n)."""


def measure(
    width: int,
    batch: int,
    rank: int,
    dtype: torch.dtype,
    repeats: int,
    only: list[str] | None = None,
    device: str = "cpu",
) -> dict[str, object]:
    """Medians, ratios and memory of every way, of the reference's time where it is among them."""
    steps = {
        name: step
        for name, step in make_steps(width, batch, rank, dtype, device).items()
        if not only or name in only
    }
    sync, peak = (torch.cuda.synchronize, timing.cuda_peak) if device == "cuda" else (None, timing.cpu_peak)
    times = timing.interleaved(steps, repeats, sync=sync)
    reference = REFERENCE if REFERENCE in steps else next(iter(steps))
    return {
        "width": width,
        "batch": batch,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(median(values), 2) for name, values in times.items()},
        f"ratio_to_{reference}": timing.ratios(times, reference),
        "peak_mib": {name: round(peak(step) / 2**20, 1) for name, step in steps.items()},
        "kept_mib": {name: round(kept(step) / 2**20, 1) for name, step in steps.items()},
    }


def make_steps(
    width: int, batch: int, rank: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], object]]:
    """One step of every way on the same numbers: a square 2:4 weight, factors in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    scores = torch.rand(width, width // 4, 4, generator=generator)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    weight = (draw(width, width) / width**0.5 * mask.view(width, width).to(device)).to(dtype)
    x, grad = draw(batch, width).to(dtype).requires_grad_(), draw(batch, width).to(dtype)
    spp = (0.1 * draw(rank, width)).requires_grad_(), (0.1 * draw(width, 1)).requires_grad_()
    low_rank = (0.1 * draw(width, rank)).requires_grad_(), (0.1 * draw(rank, width)).requires_grad_()

    def step(way: Way, factors: tuple[Tensor, Tensor]) -> Callable[[], object]:
        def run() -> object:
            for leaf in (x, *factors):
                leaf.grad = None
            return way(x, weight, *factors, 2.0).backward(grad)

        return run

    steps = {name: step(way, low_rank) for name, way in RIVALS.items()}
    steps |= {"spp_literal": step(rivals.spp_literal, spp)}
    steps |= {"spp_literal_checkpoint": step(rivals.spp_literal_checkpoint, spp)}
    packed = tuple(PACKINGS["2:4"].pack(weight).values())
    for name in ("spp", *LOW_RANK):
        method = make_method(name, rank=rank, scale=2.0)
        ops, factors = ops_of(method, (width, width)), spp if name == "spp" else low_rank
        steps[f"{name}_fused"] = step(op(ops.fused, method), factors)
        steps[f"{name}_packed"] = step(op(ops.packed["2:4"], method, *packed), factors)
        if name == "spp":
            steps["spp_reference"] = step(op(ops.linear, method), factors)
    return steps


def kept(step: Callable[[], object]) -> int:
    """Bytes of the tensors that forward saves for backward, each storage once, weight and factors left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and not tensor.is_floating_point()) and tensor.numel() > 1:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())
