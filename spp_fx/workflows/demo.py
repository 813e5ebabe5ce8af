"""demo: the whole way on a small model, offline, in a few minutes."""

import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.exporters.onnx.check import run_onnx
from spp_fx.training.perplexity import perplexity
from spp_fx.training.progress import ProgressCallback
from spp_fx.training.rows import held_out
from spp_fx.workflows.demo_model import WINDOW, train_model, write_text
from spp_fx.workflows.evaluate import evaluate
from spp_fx.workflows.export import ExportSettings, export
from spp_fx.workflows.inject import inject
from spp_fx.workflows.load import load_tokenizer
from spp_fx.workflows.merge import merge
from spp_fx.workflows.prune import prune
from spp_fx.workflows.train import TrainSettings, train
from spp_fx.workflows.verify import verify

DENSE_STEPS = 900
ADAPTER_STEPS = 120


class Bar(Protocol):
    """A bar of steps."""

    def update(self, done: int, total: int | None = None, item: str = "") -> None: ...


class Screen(Protocol):
    """What the demo shows itself on."""

    def say(self, line: str) -> None: ...

    def steps_bar(self, title: str, total: int | None = None) -> AbstractContextManager[Bar]: ...


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        dense, pruned, recovered, onnx: perplexity on the held-out topics; `onnx` as onnxruntime computes it.
        masks_equal: masks of the merged model equal to the lock, of `sites`.
        sizes: bytes of the weights of each form.
    """

    dense: float
    pruned: float
    recovered: float
    onnx: float
    sites: int
    masks_equal: int
    sizes: dict[str, int]

    @property
    def share_recovered(self) -> float:
        """Share of the perplexity lost by pruning that training won back."""
        return (self.pruned - self.recovered) / (self.pruned - self.dense)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share_recovered": self.share_recovered}


def demo(out: Path | None, screen: Screen) -> DemoResult:
    """Train, prune, inject, train, merge, verify, export, run; each step with the command that does it.

    Args:
        out: where everything is left to be looked at; None for a temporary folder.

    Raises:
        UsageError: `out` exists.
    """
    with _folder(out) as folder:
        text = write_text(folder)
        model, sparse, adapter = (folder / name for name in ("model", "model-2of4", "model-2of4-spp"))
        merged = folder / "model-2of4-spp-merged"
        screen.say("a small Llama learns Python's help topics from scratch")
        with screen.steps_bar("training dense") as bar:
            train_model(model, text.train, DENSE_STEPS, _updates(bar))
        dense = _perplexity(model, text.valid, screen)
        screen.say("$ spp-fx prune model -o model-2of4 --pattern 2:4")
        prune(model, sparse, method="magnitude", pattern="2:4")
        pruned = _perplexity(sparse, text.valid, screen)
        screen.say("$ spp-fx inject model-2of4 --rank 16")
        inject(sparse, adapter)
        screen.say(
            f"$ spp-fx train model-2of4-spp --data train.txt --steps {ADAPTER_STEPS} --seq-len {WINDOW}"
        )
        with screen.steps_bar("training adapter") as bar:
            settings = TrainSettings(steps=ADAPTER_STEPS, seq_len=WINDOW)
            train(adapter, text.train, settings, callbacks=[ProgressCallback(_updates(bar))])
        screen.say("$ spp-fx merge model-2of4-spp --verify-sparsity")
        merge(adapter, merged)
        recovered = _perplexity(merged, text.valid, screen)
        screen.say("$ spp-fx verify model-2of4-spp-merged --pattern 2:4 --against model-2of4")
        verdict = verify(merged, pattern="2:4", against=sparse)
        screen.say("$ spp-fx export model-2of4-spp-merged --format cusparselt --dtype bfloat16")
        packed = export(merged, folder / "cusparselt", "cusparselt", ExportSettings(dtype="bfloat16"))
        screen.say("$ spp-fx export model-2of4-spp-merged --format onnx")
        graph = export(merged, folder / "onnx", "onnx", say=screen.say)
        screen.say("the ONNX file runs in onnxruntime")
        with screen.steps_bar("onnxruntime") as bar:
            onnx = _onnx_perplexity(graph.out / "model.onnx", merged, text.valid, bar)
        sizes = {
            "dense model (float32)": (model / "model.safetensors").stat().st_size,
            "merged model (float32)": (merged / "model.safetensors").stat().st_size,
            "onnx, sparse initializers (float32)": (graph.out / "model.onnx").stat().st_size,
            "sparse weights, dense bfloat16": packed.manifest.sizes["dense_bytes"],
            "sparse weights, packed for cuSPARSELt": packed.manifest.sizes["sites_bytes"],
        }
    equal = sum(site.mask_equal is True for site in verdict.sites)
    return DemoResult(dense, pruned, recovered, onnx, len(verdict.sites), equal, sizes)


@contextmanager
def _folder(out: Path | None) -> Generator[Path, None, None]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="spp-fx-demo-") as name:
            yield Path(name)
        return
    if out.exists():
        raise UsageError(f"{out} exists; give another -o")
    out.mkdir(parents=True)
    yield out


def _updates(bar: Bar) -> Callable[[int, int, str], None]:
    return lambda done, total, note: bar.update(done, total, note)


def _perplexity(model: Path, text: Path, screen: Screen) -> float:
    value = evaluate(model, text, seq_len=WINDOW).result.perplexity
    screen.say(f"  perplexity {value:.2f}")
    return value


def _onnx_perplexity(file: Path, model: Path, text: Path, bar: Bar) -> float:
    windows = held_out(text, load_tokenizer(model), WINDOW).windows
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done, len(windows))

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(run_onnx(file, ids.numpy(), mask.numpy()))

    return perplexity(logits, windows, tick).perplexity
