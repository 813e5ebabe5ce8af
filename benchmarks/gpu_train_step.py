"""One training step of one 2:4 linear on a GPU, exact SPP against its rivals.

    PYTHONPATH=. python benchmarks/gpu_train_step.py --output benchmarks/results/gpu_train_step.json

Needs torch with CUDA and Triton, and this checkout; nothing is installed. The Triton kernels it times are held
to the definition by tests/adapters/test_triton.py, compiled where there is a GPU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from common import linear


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try it out")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_train_step: torch sees no CUDA device, so nothing was measured")
    dtype = getattr(torch, options.dtype)
    results = [
        linear.measure(width, options.batch, options.rank, dtype, options.repeats, device=options.device)
        for width in options.width
    ]
    text = json.dumps(
        {"question": "one step of one linear", "on": describe(options.device), "results": results}, indent=1
    )
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


def describe(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


if __name__ == "__main__":
    main()
