"""What does running a traced program cost against the eager model it came from?

    python benchmarks/graph_overhead.py --tokens 2048

Both run the same weights; a step is forward, loss and backward to the embeddings, all else frozen. The two
take turns, and `overhead` is the median of the pairs' ratios less one.
"""

import argparse
import json
from statistics import median

import torch
from common import timing
from common.programs import small_llama
from torch import nn

from spp_fx.graph.trace import trace
from spp_fx.passes.causal import Causal
from spp_fx.passes.pipeline import run_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    results = [measure(dtype, options) for dtype in options.dtype]
    print(json.dumps({"question": "a traced program against the eager model", "results": results}, indent=1))


def measure(dtype: str, options: argparse.Namespace) -> dict[str, object]:
    model = small_llama("110m", options.layers, getattr(torch, dtype)).requires_grad_(False).train()
    model.get_input_embeddings().requires_grad_(True)
    masked = trace(model)
    causal = trace(model)
    run_pipeline(causal, [Causal()])
    ids = torch.randint(model.config.vocab_size, (options.tokens // options.seq_len, options.seq_len))

    def step(module: nn.Module) -> None:
        module.zero_grad()
        module(ids, labels=ids).loss.backward()

    runs = {"eager": model, "program": causal, "program_with_mask": masked}
    times = timing.interleaved(
        {name: lambda module=module: step(module) for name, module in runs.items()}, options.repeats
    )
    return {
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": options.tokens,
        "sequence": options.seq_len,
        "milliseconds": {name: round(median(values), 1) for name, values in times.items()},
        "overhead": {
            name: round(median(a / b for a, b in zip(times[name], times["eager"], strict=True)) - 1, 4)
            for name in ("program", "program_with_mask")
        },
    }


if __name__ == "__main__":
    main()
