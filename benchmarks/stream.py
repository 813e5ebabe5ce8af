"""How fast do merge and verify go through a model folder, against cp and cat, and in how much memory?

    python benchmarks/stream.py --gb 1 8

For each size, writes a random Llama-shaped model in bfloat16 shards, prunes it to 2:4, gives it an adapter with
random factors, reads everything once, and times in turn, as commands in processes of their own:

- `cp -r` of the model folder, and `cp -r` with `sync`: what was written is on the disk, as after a merge;
- `spp-fx merge --no-verify-sparsity`, and the whole merge, which proves the base, reads all back and hashes it;
- `cat` of the weight files to /dev/null; `spp-fx verify` by the lock beside the model, and with one job;
- `spp-fx --version`, which is what any command takes to start.

`ratio` is the median against the median of `cp -r` (merge) or `cat` (verify) in the same run. `peak_mb` is the
largest resident set of the process; `bound_mb` is 1 GB and three times the largest tensor. With two sizes,
`per_gb` is the time between them for each further gigabyte, and `per_gb_ratio` its ratio: what a folder
of any size comes to.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common.llama import Shape, write_llama
from common.process import run_python, run_spp_fx
from common.report import publish
from safetensors.numpy import load_file, save_file

from spp_fx.storage.folder import ModelFolder

AGAINST = {"merge": "cp", "merge_proven": "cp", "verify": "cat", "verify_one_job": "cat"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[1, 8], help="sizes of the model's weights")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    results = [measure(gb, options) for gb in options.gb]
    report: dict[str, Any] = {
        "question": "merge and verify against cp and cat, and their memory",
        "command": "python benchmarks/stream.py " + " ".join(sys.argv[1:]),
        "cores": os.cpu_count(),
        "results": results,
    }
    if len(results) > 1:
        report["slopes"] = slopes(results[0], results[-1])
    publish(report, options.output)


def measure(gb: float, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        model, adapter = prepare(root, gb, options.hidden, options.intermediate)
        weights = sorted(model.glob("*.safetensors"))
        tensors = [
            info.nbytes for shard in ModelFolder.open(model).shards for info in shard.header.tensors.values()
        ]
        copy, out = root / "copy", root / "out"
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "start": lambda: spp_fx("--version"),
            "cp": lambda: command("cp", "-r", model, copy),
            "cp_sync": lambda: command("sh", "-c", 'cp -r "$0" "$1" && sync', model, copy),
            "merge": lambda: spp_fx("merge", adapter, "-o", out, "-q", "--no-verify-sparsity"),
            "merge_proven": lambda: spp_fx("merge", adapter, "-o", out, "-q"),
            "cat": lambda: command("sh", "-c", 'cat "$@" > /dev/null', "cat", *weights),
            "verify": lambda: spp_fx("verify", model, "-q"),
            "verify_one_job": lambda: spp_fx("verify", model, "-q", "--jobs", 1),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
        for turn in range(options.repeats + 1):  # the first one warms caches and kernels
            for name, way in ways.items():
                seconds, peak = way()
                for made in (copy, out):
                    shutil.rmtree(made, ignore_errors=True)
                os.sync()
                if turn:
                    times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
    middle = {name: median(values) for name, values in times.items()}
    return {
        "gb": round(sum(tensors) / 1e9, 3),
        "median_seconds": {name: round(value, 3) for name, value in middle.items()},
        "range": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "ratio": {name: round(middle[name] / middle[base], 3) for name, base in AGAINST.items()},
        "ratio_to_cp_sync": round(middle["merge"] / middle["cp_sync"], 3),
        "peak_mb": {name: round(peaks[name]) for name in AGAINST},
        "bound_mb": round((1e9 + 3 * max(tensors)) / 1e6),
    }


def prepare(root: Path, gb: float, hidden: int, intermediate: int) -> tuple[Path, Path]:
    """A sparse model of some size and an adapter over it whose factors change every weight."""
    heads = max(1, hidden // 128)
    shape = Shape(hidden, intermediate, heads, max(1, heads // 4), 1)
    layer = 2 * shape.layer_parameters
    layers = max(1, round((1e9 * gb - 4 * 32000 * hidden) / layer))
    dense, model, adapter = root / "dense", root / "model", root / "adapter"
    write_llama(dense, Shape(hidden, intermediate, heads, max(1, heads // 4), layers))
    run_spp_fx("prune", dense, "-o", model, "--pattern", "2:4", "-q")
    shutil.rmtree(dense)
    run_spp_fx("inject", model, "-o", adapter, "-q")
    path = adapter / "adapter_model.safetensors"
    factors, random = load_file(path), np.random.default_rng(0)
    for name in factors:
        if name.endswith("spp_beta"):
            factors[name] = (0.05 * random.standard_normal(factors[name].shape)).astype(np.float32)
    save_file(factors, path, {"format": "pt"})
    return model, adapter


def spp_fx(*arguments: Any) -> tuple[float, float]:
    run = run_python("-m", "spp_fx", *arguments)
    return run.seconds, run.peak_mb


def command(*arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    subprocess.run([str(argument) for argument in arguments], check=True)
    return time.perf_counter() - start, 0.0


def slopes(small: dict[str, Any], large: dict[str, Any]) -> dict[str, dict[str, float]]:
    more = large["gb"] - small["gb"]
    before, after = small["median_seconds"], large["median_seconds"]
    per_gb = {name: (after[name] - before[name]) / more for name in after}
    return {
        "per_gb": {name: round(value, 4) for name, value in per_gb.items()},
        "per_gb_ratio": {name: round(per_gb[name] / per_gb[base], 3) for name, base in AGAINST.items()},
    }


if __name__ == "__main__":
    main()
