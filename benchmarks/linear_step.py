"""How long does one training step of one 2:4 linear take, and what does it hold, against the rivals'?

    python benchmarks/linear_step.py --width 2048 --batch 1024 --dtype bfloat16 float32

A step is forward and backward with a given gradient of the output; x, and the factors in float32, want
theirs. The ways run in turn; `ratio` is that of medians to LoRS', `peak` the bytes held at most during the
step (output and gradients included), `kept` what forward holds for backward beyond weight and factors.
"""

import argparse
import json

import torch
from common import linear


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of ways; default: all")
    options = parser.parse_args()
    results = [
        linear.measure(width, batch, rank, getattr(torch, dtype), options.repeats, options.only)
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


if __name__ == "__main__":
    main()
