"""How long does a training step of a whole small Llama take, with our methods and with their rivals?

    python benchmarks/model_step.py --repeats 7

All ways run in the same traced program on the same 2:4 weights; a step is forward, loss and backward. The
ways take turns; `ratio_to_lors` is that of medians, `peak` the bytes that torch held at most during a step.
In the model `7b-share` the linears have the share of a step that they have in a 7B.
"""

import argparse
import copy
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from common import rivals, timing
from common.programs import LLAMAS, SCALE, Way, abstract_program, run_by, small_llama

from spp_fx.adapters.method import make_method
from spp_fx.graph.program import Program
from spp_fx.passes.lower import Lower
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline

REFERENCE = "lors"


@dataclass(frozen=True)
class Prepared:
    """How a program becomes one of the things measured: `prepare` it, injected with `method`."""

    prepare: Callable[[Program], object]
    method: str = "spp"


def ours(method: str, kernel: str = "fused", storage: str = "dense") -> Prepared:
    return Prepared(lambda program: run_pipeline(program, [Lower(kernel=kernel, storage=storage)]), method)


def rival(way: Way, *, low_rank: bool = True) -> Prepared:
    return Prepared(lambda program: run_by(program, way, low_rank=low_rank))


def checkpointed(program: Program) -> None:
    run_pipeline(program, [Lower(), Partition(), Checkpoint()])


WAYS = {
    "lors": rival(rivals.lors),
    "spp_fused": ours("spp"),
    "spp_packed": ours("spp", storage="packed"),
    "spp_fused_layer_checkpoint": Prepared(checkpointed),
    "spp_reference": ours("spp", kernel="reference"),
    "spp_literal_checkpoint": rival(rivals.spp_literal_checkpoint, low_rank=False),
    "sqft": rival(rivals.sqft),
    "sqft_checkpoint": rival(rivals.sqft_checkpoint),
    "hira": rival(rivals.hira),
    "sqft_fused": ours("sqft"),
    "lors_fused": ours("lors"),
    "hira_fused": ours("hira"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(LLAMAS), default="7b-share")
    parser.add_argument("--layers", type=int, help="instead of the model's own")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), help="default: all")
    options = parser.parse_args()
    results = [
        measure(dtype, rank, length, options)
        for dtype in options.dtype
        for rank in options.rank
        for length in options.seq_len
    ]
    report = {"question": "one step of a small Llama", "threads": torch.get_num_threads(), "results": results}
    print(json.dumps(report, indent=1))


def measure(dtype: str, rank: int, length: int, options: argparse.Namespace) -> dict[str, object]:
    model = small_llama(options.model, options.layers, getattr(torch, dtype))
    parameters = sum(p.numel() for p in model.parameters())
    abstract: dict[str, Program] = {}
    steps: dict[str, Callable[[], object]] = {}
    frozen: dict[str, int] = {}
    for name in options.only or WAYS:
        way = WAYS[name]
        if way.method not in abstract:
            method = make_method(way.method, rank=rank, scale=SCALE, dropout=0.0)
            abstract[way.method] = abstract_program(model, method)
        program = copy.deepcopy(abstract[way.method])
        way.prepare(program)
        steps[name] = step_of(program, options.tokens // length, length)
        frozen[name] = sum(p.nbytes for p in program.parameters() if not p.requires_grad)
    gc.collect()
    times = timing.interleaved(steps, options.repeats, warmup=1)
    reference = REFERENCE if REFERENCE in steps else next(iter(steps))
    return {
        "model": options.model,
        "parameters": parameters,
        "dtype": dtype,
        "rank": rank,
        "sequence": length,
        "tokens": options.tokens,
        "milliseconds": {name: round(median(values)) for name, values in times.items()},
        f"ratio_to_{reference}": timing.ratios(times, reference),
        "peak_mib": {name: round(timing.cpu_peak(step) / 2**20) for name, step in steps.items()},
        "frozen_mib": {name: round(size / 2**20, 1) for name, size in frozen.items()},
    }


def step_of(program: Program, rows: int, length: int) -> Callable[[], object]:
    ids = torch.randint(program.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        program.zero_grad()
        loss = program(ids, labels=ids).loss
        assert loss is not None
        loss.backward()

    return run


if __name__ == "__main__":
    main()
