"""What does calibrated pruning of a model that does not fit cost: memory for one layer, time linear in layers?

    python benchmarks/prune_layers.py --layers 8 16 32
    python benchmarks/prune_layers.py --layers 8 16 32 --reconstruct masked-full

Makes, for each number of layers, a random Llama-shaped model in bfloat16 shards on the spot, prunes it with
`spp-fx prune --method wanda --pattern 2:4` in a process of its own, and asks the system for that process's
largest resident set. With --reconstruct the model is pruned by magnitude, and `spp-fx reconstruct --epochs 1` of the
pruned one is measured. `floor` is the same for a model of one small layer: what the libraries take alone.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from common.llama import Shape, write_llama
from common.process import run_spp_fx
from common.report import publish

FLOOR = Shape(hidden=64, intermediate=128, heads=4, kv_heads=4, layers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--reconstruct", help="a method of reconstruct, which is then measured instead")
    parser.add_argument("--floor", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    parser.add_argument("--folder", type=Path, help="where to write models (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    heads = max(1, options.hidden // 64)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        floor = measure(Path(folder), FLOOR, options) if options.floor else None
        for layers in options.layers:
            shape = Shape(options.hidden, options.intermediate, heads, max(1, heads // 8), layers)
            results.append(measure(Path(folder), shape, options))
    slope = [each["seconds"] / each["layers"] for each in results]
    verb = f"prune --method {options.method}"
    if options.reconstruct:
        verb = f"reconstruct --method {options.reconstruct} --epochs 1"
    report = {
        "question": "one layer in memory",
        "command": f"spp-fx {verb} --samples {options.samples} --seq-len {options.seq_len}",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "floor": floor,
        "results": results,
        "seconds_per_layer": [round(each, 2) for each in slope],
    }
    publish(report, options.output)


def measure(folder: Path, shape: Shape, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one run, and the sizes it should be compared with."""
    model, out, sparse, calib = (folder / name for name in ("model", "out", "sparse", "calib.txt"))
    stored = write_llama(model, shape)
    calib.write_text(" ".join(f"w{i % 200}" for i in range(2 * options.samples * options.seq_len)))
    verb = ("prune", model, "--method", options.method)
    if options.reconstruct:
        run_spp_fx("prune", model, "-o", sparse, "-q", "--json")
        verb = ("reconstruct", sparse, "--teacher", model, "--method", options.reconstruct, "--epochs", 1)
    run = run_spp_fx(
        *(*verb, "-o", out, "-q", "--json"),
        *("--calib", calib, "--samples", options.samples, "--seq-len", options.seq_len),
    )
    for path in (model, sparse, out):
        shutil.rmtree(path, ignore_errors=True)
    hidden_states = 2 * options.samples * options.seq_len * shape.hidden
    return {
        "layers": shape.layers,
        "stored_gb": round(stored / 1e9, 3),
        "layer_mb": round(2 * shape.layer_parameters / 1e6, 1),
        "hidden_states_mb": round(hidden_states / 1e6, 1),
        "seconds": round(run.seconds, 1),
        "peak_mb": round(run.peak_mb, 1),
    }


if __name__ == "__main__":
    main()
