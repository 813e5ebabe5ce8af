"""Which criterion keeps most? Perplexity of a pruned model, by criterion and pattern.

    python benchmarks/prune_criteria.py MODEL --calib train.txt --data valid.txt --samples 64

Every cell is `spp-fx prune` and `spp-fx eval` over the whole of the data.
"""

import argparse
import tempfile
from pathlib import Path

from common.report import publish
from transformers.utils import logging

from spp_fx.verbs.evaluate import evaluate
from spp_fx.verbs.load import Calibration
from spp_fx.verbs.prune import prune

WAYS = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "ria": ("ria", {}),
    "sparsegpt": ("sparsegpt", {}),
    "wanda+dsnot": ("wanda", {"repair": "dsnot"}),
    "magnitude+admm": ("magnitude", {"update": "admm"}),
    "wanda+admm": ("wanda", {"update": "admm"}),
    "sparsegpt+admm": ("sparsegpt", {"update": "admm"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4", "4:8", "2:8", "75%"])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    logging.disable_progress_bar()
    calibration = Calibration(options.calib, options.samples, options.seq_len)
    table = {way: {p: cell(options, calibration, way, p) for p in options.patterns} for way in options.ways}
    report = {
        "question": "perplexity by criterion and pattern",
        "model": options.model.name,
        "dense": round(evaluate(options.model, options.data).result.perplexity, 2),
        "samples": options.samples,
        "perplexity": table,
    }
    publish(report, options.output)


def cell(options: argparse.Namespace, calibration: Calibration, way: str, pattern: str) -> float:
    method, changes = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sparse"
        seen = calibration if way != "magnitude" else None
        prune(options.model, out, method=method, pattern=pattern, **changes, calibration=seen)
        return round(evaluate(out, options.data).result.perplexity, 2)


if __name__ == "__main__":
    main()
