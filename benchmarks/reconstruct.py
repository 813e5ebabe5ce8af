"""What does block reconstruction win back, and when is it better than training? Perplexity and seconds, same tokens.

    python benchmarks/reconstruct.py MODEL --text train.txt --data valid.txt

A pruned model (wanda) is reconstructed from the dense one, or trained by distillation from it, both on the same number
of tokens; or first reconstructed and then trained. Every cell is verbs of spp-fx and `spp-fx eval` over the whole data.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.report import publish
from transformers.utils import logging

from spp_fx.verbs.evaluate import evaluate
from spp_fx.verbs.inject import inject
from spp_fx.verbs.merge import merge
from spp_fx.verbs.prune import prune
from spp_fx.verbs.reconstruct import reconstruct
from spp_fx.verbs.settings import Calibration, TrainSettings
from spp_fx.verbs.train import train

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "2:8"])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = {
        "question": "perplexity after reconstruction and training on the same tokens",
        "model": options.model.name,
        "dense": perplexity(options.model, options.data),
        "tokens": options.windows * options.seq_len * options.epochs,
        "rows": {pattern: rows(options, pattern) for pattern in options.patterns},
    }
    publish(report, options.output)


def rows(options: argparse.Namespace, pattern: str) -> dict[str, dict[str, float]]:
    """Perplexity, and seconds after pruning, of each way."""
    calibration = Calibration(options.text, options.windows, options.seq_len)
    steps = options.epochs * max(1, options.windows // BATCH)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pruned, better = folder / "pruned", folder / "better"
        prune(options.model, pruned, method="wanda", pattern=pattern, calibration=calibration)

        def rebuilt(out: Path, **how: Any) -> Path:
            reconstruct(
                pruned, out, teacher=options.model, calibration=calibration, epochs=options.epochs,
                batch_size=BATCH, force=True, **how,
            )  # fmt: skip
            return out

        def trained(model: Path, method: str, rank: dict[str, int]) -> Path:
            adapter, out = folder / "adapter", folder / "merged"
            inject(model, adapter, method=method, force=True, **rank)
            settings = TrainSettings(steps=steps, batch_size=BATCH, seq_len=options.seq_len)
            train(adapter, options.text, settings, teacher=options.model)
            merge(adapter, out, force=True)
            return out

        ways: dict[str, Callable[[], Path]] = {
            "pruned": lambda: pruned,
            "reconstruct admm": lambda: rebuilt(better, method="admm"),
            "reconstruct spp": lambda: rebuilt(better, method="spp"),
            "reconstruct kept weights": lambda: rebuilt(better),
            "train spp": lambda: trained(pruned, "spp", {"rank": 16}),
            "train kept weights": lambda: trained(pruned, "masked-full", {}),
            "reconstruct, then train spp": lambda: trained(rebuilt(better), "spp", {"rank": 16}),
            "reconstruct, then train kept weights": lambda: trained(rebuilt(better), "masked-full", {}),
        }
        found: dict[str, dict[str, float]] = {}
        for name, way in ways.items():
            begin = time.perf_counter()
            out = way()
            seconds = round(time.perf_counter() - begin, 1)
            found[name] = {"perplexity": perplexity(out, options.data), "seconds": seconds}
        return found


def perplexity(model: Path, data: Path) -> float:
    return round(evaluate(model, data).result.perplexity, 2)


if __name__ == "__main__":
    main()
