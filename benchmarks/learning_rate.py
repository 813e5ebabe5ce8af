"""How far is the loss at train's default learning rate from that at the best rate of a grid?

    python benchmarks/learning_rate.py --width 64 128 512 2048
    python benchmarks/learning_rate.py --width 128 --method spp hira sqft --steps 60 180 --teacher

For each width a Llama is trained for a while on Python's help topics, pruned to 2:4 by magnitude, and its adapter
trained anew at every rate by the public API. `loss` is the mean of the last fifth of a run's steps; `excess` how
much more it is at the default rate than at the best one; `before` the same for 4e-3 * sqrt(4096 / width), SPP's
default until decision 0003 was measured. --model takes a folder, pruned already, in place of a width.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from spp_fx.verbs.demo import VOCABULARY, train_model, write_text
from spp_fx.verbs.inject import inject
from spp_fx.verbs.prune import prune
from spp_fx.verbs.settings import TrainSettings
from spp_fx.verbs.train import Trained, train

FACTORS = (0.25, 0.5, 2, 4)
"""The grid, as multiples of the default rate."""
SEED = 1
"""Of the dense model: adapters, whose seed is 0, see the text in another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--model", type=Path, help="a pruned folder, in place of --width; needs --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dense", type=Path, help="of --model, for --teacher")
    parser.add_argument(
        "--dense-steps", type=int, default=200, help="of training before pruning; 0: random weights"
    )
    parser.add_argument("--method", nargs="+", default=["spp"])
    parser.add_argument("--rank", type=int)
    parser.add_argument(
        "--no-trials", action="store_true", help="the method's suggestion instead of train's default"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--teacher", action="store_true", help="learn from the dense model")
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    options = parser.parse_args()
    if options.model and not options.data:
        parser.error("--model needs --data")
    if options.model and options.teacher and not options.dense:
        parser.error("--model with --teacher needs --dense")
    with tempfile.TemporaryDirectory() as name:
        results = [
            measure(case, method, steps, options, Path(name))
            for case in cases(options, Path(name))
            for method in options.method
            for steps in options.steps
        ]
    print(json.dumps({"question": "the default learning rate against a grid", "results": results}, indent=1))


def cases(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Model, its dense origin, training text and a name of each case."""
    if options.model:
        return [
            {"name": options.model.name, "model": options.model, "dense": options.dense, "data": options.data}
        ]
    text, _ = write_text(folder)
    found: list[dict[str, Any]] = []
    for width in options.width:
        dense, pruned = folder / f"dense-{width}", folder / f"pruned-{width}"
        train_model(
            dense, text, options.dense_steps, lambda *_: None, SEED, config=small_llama(width),
            learning_rate=4e-3 * min(1.0, 128 / width), batch=options.batch, window=options.seq_len,
        )  # fmt: skip
        prune(dense, pruned, method="magnitude", pattern="2:4")
        found.append(
            {"name": f"width {width}", "width": width, "model": pruned, "dense": dense, "data": text}
        )
    return found


def small_llama(width: int) -> LlamaConfig:
    """Two layers, and one where it is wide."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2 if width < 512 else 1,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(2, width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def measure(
    case: dict[str, Any], method: str, steps: int, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The loss at the default rate, at multiples of it, and at SPP's default before."""
    every = max(1, steps // 10)
    settings = TrainSettings(
        steps=steps,
        batch_size=options.batch,
        seq_len=options.seq_len,
        logging_steps=every,
        force=True,
        lr_trials=not options.no_trials,
    )
    adapter = folder / "adapter"
    chosen = {"rank": options.rank} if options.rank else {}

    def run(lr: float | None) -> tuple[Trained, float]:
        inject(case["model"], adapter, method=method, force=True, **chosen)
        teacher = case["dense"] if options.teacher else None
        trained = train(adapter, case["data"], replace(settings, lr=lr), teacher=teacher)
        last = trained.losses[-max(1, steps // 5 // every) :]
        return trained, sum(last) / len(last)

    default, loss = run(None)
    lr = default.lr
    grid = {lr * factor: run(lr * factor)[1] for factor in options.factors}
    best = min([loss, *grid.values()])
    result = {
        "case": case["name"], "method": method, "rank": options.rank, "steps": steps, "teacher": options.teacher,
        "lr": lr, "loss": loss, "excess": loss / best - 1, "grid": grid, "trials": default.lr_trials,
    }  # fmt: skip
    if method == "spp":
        old = 4e-3 * sqrt(4096 / json.loads((case["model"] / "config.json").read_text())["hidden_size"])
        result["before"] = {"lr": old, "loss": (before := run(old)[1]), "excess": before / best - 1}
    return result


if __name__ == "__main__":
    main()
