"""How long does a training step of a whole small Llama take, with exact SPP and with its rivals?

    python benchmarks/model_step.py --seq-len 1024 --tokens 2048 --dtype bfloat16

All ways run in the same traced program on the same 2:4 weights; a step is forward, loss and backward. The
ways take turns; `ratio_to_lors` is that of medians, `peak` the bytes that torch held at most during a step.
"""

import argparse
import copy
import gc
import json
from collections.abc import Callable
from statistics import median

import torch
from common import rivals, timing
from common.programs import abstract_program, run_by, small_llama

from spp_fx.graph.program import Program
from spp_fx.passes.lower import Lower
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline

REFERENCE = "lors"


def lowered(kernel: str, storage: str = "dense") -> Callable[[Program], object]:
    return lambda program: run_pipeline(program, [Lower(kernel=kernel, storage=storage)])


def checkpointed(program: Program) -> None:
    run_pipeline(program, [Lower(), Partition(), Checkpoint()])


PREPARE: dict[str, Callable[[Program], object]] = {
    "lors": lambda program: run_by(program, rivals.lors, low_rank=True),
    "spp_fused": lowered("fused"),
    "spp_packed": lowered("fused", "packed"),
    "spp_fused_layer_checkpoint": checkpointed,
    "spp_reference": lowered("reference"),
    "spp_literal_checkpoint": lambda program: run_by(program, rivals.spp_literal_checkpoint, low_rank=False),
    "sqft": lambda program: run_by(program, rivals.sqft, low_rank=True),
    "sqft_checkpoint": lambda program: run_by(program, rivals.sqft_checkpoint, low_rank=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PREPARE), help="default: all")
    options = parser.parse_args()
    results = [
        measure(options.layers, dtype, rank, length, options)
        for dtype in options.dtype
        for rank in options.rank
        for length in options.seq_len
    ]
    report = {"question": "one step of a small Llama", "threads": torch.get_num_threads(), "results": results}
    print(json.dumps(report, indent=1))


def measure(
    layers: int, dtype: str, rank: int, length: int, options: argparse.Namespace
) -> dict[str, object]:
    model = small_llama(layers, getattr(torch, dtype))
    parameters = sum(p.numel() for p in model.parameters())
    abstract = abstract_program(model, rank)
    steps: dict[str, Callable[[], object]] = {}
    frozen: dict[str, int] = {}
    for name in options.only or PREPARE:
        program = copy.deepcopy(abstract)
        PREPARE[name](program)
        steps[name] = step_of(program, options.tokens // length, length)
        frozen[name] = sum(p.nbytes for p in program.parameters() if not p.requires_grad)
    gc.collect()
    times = timing.interleaved(steps, options.repeats, warmup=1)
    reference = REFERENCE if REFERENCE in steps else next(iter(steps))
    return {
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
