"""demo: end to end on a small model, offline, in a few minutes."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spp_fx.console import Output, StepsBar, Table, megabytes
from spp_fx.errors import UsageError
from spp_fx.exporters.onnx.onnxruntime_check import OnnxModel
from spp_fx.training.perplexity import perplexity
from spp_fx.training.records import SEPARATOR
from spp_fx.training.samples import held_out, training_rows
from spp_fx.training.trainer import ProgressCallback
from spp_fx.verbs.evaluate import evaluate
from spp_fx.verbs.export import export
from spp_fx.verbs.inject import inject
from spp_fx.verbs.load import load_tokenizer
from spp_fx.verbs.merge import merge
from spp_fx.verbs.prune import prune
from spp_fx.verbs.settings import TrainSettings
from spp_fx.verbs.train import train
from spp_fx.verbs.verify import verify

BOS, EOS = SPECIAL = "<|bos|>", "<|eos|>"
VOCABULARY = 2048
WINDOW = 128
HELD_OUT = 10
"""One topic in this many is held out for evaluation."""
DENSE_STEPS = 900
ADAPTER_STEPS = 120


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

    def lines(self) -> Iterator[Table]:
        rows = [
            ("perplexity, dense", f"{self.dense:.2f}"),
            ("perplexity, pruned to 2:4", f"{self.pruned:.2f}"),
            ("perplexity, recovered and merged", f"{self.recovered:.2f}"),
            ("perplexity, ONNX file in onnxruntime", f"{self.onnx:.2f}"),
            ("recovered of what pruning lost", f"{self.share_recovered:.1%}"),
            ("masks equal", f"{self.masks_equal} of {self.sites}"),
            *((f"size, {name}", megabytes(size)) for name, size in self.sizes.items()),
        ]
        yield Table(("", ""), rows)


def demo(out: Path | None, screen: Output) -> DemoResult:
    """Train, prune, inject, train, merge, verify, export, run; each step with the command that does it.

    Args:
        out: where all files are kept; None for a temporary folder.

    Raises:
        UsageError: `out` exists.
    """
    with _folder(out) as folder:
        text, valid = write_text(folder)
        model, sparse, adapter = (folder / name for name in ("model", "model-2of4", "model-2of4-spp"))
        merged = folder / "model-2of4-spp-merged"
        screen.say("a small Llama learns Python's help topics from scratch")
        with screen.steps_bar("training dense") as bar:
            train_model(model, text, DENSE_STEPS, bar.update)
        dense = _perplexity(model, valid, screen)
        screen.say("$ spp-fx prune model -o model-2of4 --pattern 2:4")
        prune(model, sparse, method="magnitude", pattern="2:4")
        pruned = _perplexity(sparse, valid, screen)
        screen.say("$ spp-fx inject model-2of4 --rank 16")
        inject(sparse, adapter)
        screen.say(
            f"$ spp-fx train model-2of4-spp --data train.txt --steps {ADAPTER_STEPS} --seq-len {WINDOW}"
        )
        with screen.steps_bar("training adapter") as bar:
            settings = TrainSettings(steps=ADAPTER_STEPS, seq_len=WINDOW)
            train(adapter, text, settings, callbacks=[ProgressCallback(bar.update)], say=screen.say)
        screen.say("$ spp-fx merge model-2of4-spp --verify-sparsity")
        merge(adapter, merged)
        recovered = _perplexity(merged, valid, screen)
        screen.say("$ spp-fx verify model-2of4-spp-merged --pattern 2:4 --against model-2of4")
        verdict = verify(merged, pattern="2:4", against=sparse)
        screen.say("$ spp-fx export model-2of4-spp-merged --format cusparselt --dtype bfloat16")
        packed = export(merged, folder / "cusparselt", "cusparselt", dtype="bfloat16")
        screen.say("$ spp-fx export model-2of4-spp-merged --format onnx")
        graph = export(merged, folder / "onnx", "onnx", say=screen.say)
        screen.say("the ONNX file runs in onnxruntime")
        with screen.steps_bar("onnxruntime") as bar:
            onnx = _onnx_perplexity(graph.out / "model.onnx", merged, valid, bar)
        sizes = {
            "dense model (float32)": (model / "model.safetensors").stat().st_size,
            "merged model (float32)": (merged / "model.safetensors").stat().st_size,
            "onnx, sparse initializers (float32)": (graph.out / "model.onnx").stat().st_size,
            "sparse weights, dense bfloat16": packed.manifest.sizes["dense_bytes"],
            "sparse weights, packed for cuSPARSELt": packed.manifest.sizes["sites_bytes"],
        }
    equal = sum(site.mask_equal is True for site in verdict.sites)
    return DemoResult(dense, pruned, recovered, onnx, len(verdict.sites), equal, sizes)


def write_text(folder: Path) -> tuple[Path, Path]:
    """Python's own help topics as training and held-out text, a document a topic."""
    names = sorted(topics)
    held_out = names[HELD_OUT // 2 :: HELD_OUT]
    train, valid = folder / "train.txt", folder / "valid.txt"
    for path, chosen in ((train, [name for name in names if name not in held_out]), (valid, held_out)):
        path.write_text(
            f"\n{SEPARATOR}\n".join(topics[name].strip() for name in chosen) + "\n", encoding="utf-8"
        )
    return train, valid


def train_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts each document with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def train_model(
    folder: Path,
    text: Path,
    steps: int,
    update: Callable[[int, int, str], None],
    seed: int = 0,
    *,
    config: LlamaConfig | None = None,
    learning_rate: float = 4e-3,
    batch: int = 16,
    window: int = WINDOW,
) -> None:
    """Train a Llama, by default of about 1.3 million parameters, and save it as a model folder.

    Args:
        folder: to write; must not exist.
        text: training text.
        steps: of `batch` windows; with 0 the weights stay random.
        update: called with steps done, steps in all, and a note.
        config: of the model, with `VOCABULARY` tokens.
        window: tokens a window.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(text)
    config = config or LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config.bos_token_id, config.eos_token_id = SPECIAL.index(BOS), SPECIAL.index(EOS)
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=batch,
        weight_decay=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(text, tokenizer, window, loss_on="all", packing=False)[0],
        callbacks=[ProgressCallback(update)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(type(callback))
    if steps:
        trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def _perplexity(model: Path, text: Path, screen: Output) -> float:
    value = evaluate(model, text, seq_len=WINDOW).result.perplexity
    screen.say(f"  perplexity {value:.2f}")
    return value


def _onnx_perplexity(file: Path, model: Path, text: Path, bar: StepsBar) -> float:
    windows = held_out(text, load_tokenizer(model), WINDOW).windows
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done, len(windows))

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(OnnxModel(file).logits(ids.numpy(), mask.numpy()))

    return perplexity(logits, windows, tick).perplexity
