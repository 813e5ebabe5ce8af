"""Does a model larger than the memory export to ONNX, load, and verify?

    python benchmarks/export_large.py

Makes a random Llama-shaped model of some 3 GB in bfloat16 shards, prunes it to 2:4, and for each format runs
`spp-fx export --dtype float16` in a process of its own, whose largest resident set the system tells; then
`spp-fx verify` of the export; then onnxruntime, in another process, which loads it and runs one batch. The
logits of all formats must be the same: what they decompress is.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common.llama import Shape, write_llama
from common.process import run_python, run_spp_fx
from common.report import publish

FORMATS = ("onnx", "onnx-packed", "onnx-dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx", "onnx-packed"])
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_graph(options.run)))
        return
    heads = max(1, options.hidden // 64)
    shape = Shape(options.hidden, options.intermediate, heads, max(1, heads // 4), options.layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        dense, model = Path(folder) / "dense", Path(folder) / "model"
        stored = write_llama(dense, shape)
        run_spp_fx("prune", dense, "-o", model, "--pattern", "2:4", "-q")
        shutil.rmtree(dense)
        results = [measure(model, Path(folder) / "out", format, stored) for format in options.formats]
    if len({result.pop("logits") for result in results}) > 1:
        sys.exit("export_large: the formats do not give the same logits")
    report = {
        "question": "memory of exporting a model to ONNX, tensor by tensor",
        "command": "python benchmarks/export_large.py " + " ".join(sys.argv[1:]),
        "stored_gb": round(stored / 1e9, 3),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "results": results,
        "logits_equal": True,
    }
    publish(report, options.output)


def measure(model: Path, out: Path, format: str, stored: int) -> dict[str, Any]:
    """One format: export, verify, load; the export is removed afterwards."""
    export = run_spp_fx(
        "export", model, "--format", format, "--dtype", "float16", "--no-compare-logits", "-o", out, "-q", "--json"
    )  # fmt: skip
    written = json.loads(export.output)
    verify = run_spp_fx("verify", out, "--pattern", "2:4", "-q", "--json")
    load = run_python(__file__, "--run", out / "model.onnx")
    shutil.rmtree(out)
    sizes, verdict = written["sizes"], json.loads(verify.output)
    return {
        "format": format,
        "seconds": round(export.seconds, 1),
        "peak_mb": round(export.peak_mb),
        "peak_to_model": round(export.peak_mb * 1e6 / stored, 3),
        "file_gb": round(sizes["file_bytes"] / 1e9, 3),
        "sites_to_dense": round(sizes["sites_bytes"] / sizes["dense_bytes"], 4),
        "weights_equal": written["checks"]["weights_equal"],
        "verify": {
            "ok": verdict["ok"],
            "sites": verdict["summary"]["sites"],
            "seconds": round(verify.seconds, 1),
            "peak_mb": round(verify.peak_mb),
        },
        "onnxruntime": {"seconds": round(load.seconds, 1), "peak_mb": round(load.peak_mb)},
        "logits": json.loads(load.output)["sha256"],
    }


def run_graph(path: Path) -> dict[str, str]:
    """Load a graph in onnxruntime and run one batch; the digest of its logits."""
    import numpy as np

    from spp_fx.exporters.onnx.onnxruntime_check import OnnxModel

    ids = np.arange(16, dtype=np.int64).reshape(2, 8)
    logits = OnnxModel(path).logits(ids, np.ones_like(ids))
    if not np.isfinite(logits).all():
        sys.exit(f"export_large: {path}: its logits are not finite")
    return {"sha256": hashlib.sha256(logits.tobytes()).hexdigest()}


if __name__ == "__main__":
    main()
