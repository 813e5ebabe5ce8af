"""How long does one training step of one 2:4 linear take, and what does it hold, against the rivals'?

    python benchmarks/linear_step.py --width 2048 --batch 1024 --dtype bfloat16 float32

A step is forward and backward with a given gradient of the output; x, and the factors in float32, want
theirs. The ways run in turn; `ratio` is that of medians to LoRS', `peak` the bytes held at most during the
step (output and gradients included), `kept` what forward holds for backward beyond weight and factors.
"""

import argparse
import json
from collections.abc import Callable
from statistics import median

import torch
from common import rivals, timing
from torch import Tensor

from spp_fx.adapters.ops import packed, spp_blockwise, spp_fused, spp_linear

REFERENCE = "lors"
Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def op(overload: Callable[..., Tensor]) -> Way:
    return lambda x, w, alpha, beta, scale: overload(x, w, alpha, beta, None, None, scale, 0.0)


SPP: dict[str, Way] = {
    "spp_fused": op(spp_fused.OP),
    "spp_blockwise": op(spp_blockwise.OP),
    "spp_reference": op(spp_linear.OP),
    "spp_literal": rivals.spp_literal,
    "spp_literal_checkpoint": rivals.spp_literal_checkpoint,
}
OTHERS: dict[str, Way] = {
    "lors": rivals.lors,
    "sqft": rivals.sqft,
    "sqft_checkpoint": rivals.sqft_checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="names of ways; default: all")
    options = parser.parse_args()
    results = [
        measure(width, batch, rank, getattr(torch, dtype), options.repeats, options.only)
        for dtype in options.dtype
        for width in options.width
        for batch in options.batch
        for rank in options.rank
    ]
    print(
        json.dumps(
            {"question": "one step of one linear", "threads": torch.get_num_threads(), "results": results},
            indent=1,
        )
    )


def measure(
    width: int, batch: int, rank: int, dtype: torch.dtype, repeats: int, only: list[str] | None
) -> dict[str, object]:
    steps = {
        name: step for name, step in make_steps(width, batch, rank, dtype).items() if not only or name in only
    }
    times = timing.interleaved(steps, repeats)
    reference = REFERENCE if REFERENCE in steps else next(iter(steps))
    return {
        "width": width,
        "batch": batch,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(median(values), 2) for name, values in times.items()},
        f"ratio_to_{reference}": timing.ratios(times, reference),
        "peak_mib": {name: round(timing.cpu_peak(step) / 2**20, 1) for name, step in steps.items()},
        "kept_mib": {name: round(kept(step) / 2**20, 1) for name, step in steps.items()},
    }


def make_steps(width: int, batch: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One step of every way on the same numbers: a square 2:4 weight, factors in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scores = torch.rand(width, width // 4, 4, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    weight = (draw(width, width) / width**0.5 * kept.view(width, width)).to(dtype)
    x, grad = draw(batch, width).to(dtype).requires_grad_(), draw(batch, width).to(dtype)
    spp = (0.1 * draw(rank, width)).requires_grad_(), (0.1 * draw(width, 1)).requires_grad_()
    low_rank = (0.1 * draw(width, rank)).requires_grad_(), (0.1 * draw(rank, width)).requires_grad_()

    def step(way: Way, factors: tuple[Tensor, Tensor]) -> Callable[[], object]:
        def run() -> object:
            for leaf in (x, *factors):
                leaf.grad = None
            return way(x, weight, *factors, 2.0).backward(grad)

        return run

    ways = SPP | {"spp_packed": packed_way(weight)}
    return {name: step(way, low_rank) for name, way in OTHERS.items()} | {
        name: step(way, spp) for name, way in ways.items()
    }


def packed_way(weight: Tensor) -> Way:
    """The fused op on the weight packed; the dense one that a step hands over is not looked at."""
    tensors = packed.PACKINGS["2:4"].pack(weight)
    values, positions = tensors["values"], tensors["positions"]
    run = packed.OPS["2:4"]
    return lambda x, _, alpha, beta, scale: run(x, values, positions, alpha, beta, None, None, scale, 0.0)


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


if __name__ == "__main__":
    main()
