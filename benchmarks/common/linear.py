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


def op(overload: Callable[..., Tensor], method: Method) -> Way:
    options = op_options(method)
    return lambda x, w, alpha, beta, scale: overload(x, w, alpha, beta, None, None, *options, 0.0)


OTHERS: dict[str, Way] = {
    "lors": rivals.lors,
    "sqft": rivals.sqft,
    "sqft_checkpoint": rivals.sqft_checkpoint,
}


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

    method = make_method("spp", rank=rank, scale=2.0)
    ops = ops_of(method, (width, width))
    ways: dict[str, Way] = {
        "spp_fused": op(ops.fused, method),
        "spp_reference": op(ops.linear, method),
        "spp_literal": rivals.spp_literal,
        "spp_literal_checkpoint": rivals.spp_literal_checkpoint,
        "spp_packed": packed_way(weight, ops.packed["2:4"], method),
    }
    return {name: step(way, low_rank) for name, way in OTHERS.items()} | {
        name: step(way, spp) for name, way in ways.items()
    }


def packed_way(weight: Tensor, overload: Callable[..., Tensor], method: Method) -> Way:
    """The fused op on the weight packed; the dense one that a step hands over is not looked at."""
    values, positions = PACKINGS["2:4"].pack(weight).values()
    options = op_options(method)
    return lambda x, _, alpha, beta, scale: overload(
        x, values, positions, alpha, beta, None, None, *options, 0.0
    )


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
