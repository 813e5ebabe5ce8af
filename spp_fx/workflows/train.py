"""train: the factors of an adapter folder, in place."""

import shutil
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from spp_fx.checkpoint import atomic_file
from spp_fx.errors import SppFxError, UsageError
from spp_fx.ir.program import Program
from spp_fx.training.data import Windows, all_windows, check_vocabulary, training_windows
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.training.trainer import AdapterTrainer, CutEachEpoch
from spp_fx.workflows.adapter_folder import FACTORS, AdapterFolder, write_factors
from spp_fx.workflows.load import Loaded, load_program, load_tokenizer, window_length

PAPER_RATE = 4e-3
PAPER_WIDTH = 4096


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps, epochs: one of the two ends training; both None means 3 epochs.
        lr: peak learning rate; None chooses by the sites' width, see `default_rate`.
        batch_size: windows per step and device.
        seq_len: tokens per window; None for 512 or the model's positions if fewer.
        save_steps: steps between checkpoints; None for none but the last.
        resume: go on from the newest checkpoint of the adapter folder.
        seed: of the order of windows and of dropout.
    """

    steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    batch_size: int = 16
    seq_len: int | None = None
    weight_decay: float = 1e-3
    warmup: float = 0.03
    save_steps: int | None = None
    resume: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What training did."""

    adapter: Path
    steps: int
    lr: float
    seq_len: int
    loss: float
    seconds: float
    trainable: int
    before: Perplexity | None
    after: Perplexity | None

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": str(self.adapter),
            "steps": self.steps,
            "lr": self.lr,
            "seq_len": self.seq_len,
            "loss": self.loss,
            "seconds": self.seconds,
            "trainable_parameters": self.trainable,
            "perplexity_before": self.before.perplexity if self.before else None,
            "perplexity": self.after.perplexity if self.after else None,
        }


def train(
    adapter: Path,
    data: Path,
    settings: TrainSettings,
    *,
    eval_data: Path | None = None,
    teacher: Path | None = None,
    base: Path | None = None,
    trust_remote_code: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> Trained:
    """Train an adapter folder on a text file and write the factors back into it, whole or not at all.

    Checkpoints (`checkpoint-N`) go into the adapter folder; a run that was stopped goes on with `resume`,
    to the same factors it would have reached. With a `teacher` (the dense model, say) its distribution is
    learned instead of the text's own tokens.

    Raises:
        UsageError: settings or data that cannot be used, nothing to resume.
        SppFxError: the loss is not finite; the adapter stays as it was.
    """
    _check(settings)
    loaded = load_program(adapter, base=base, trust_remote_code=trust_remote_code)
    if not loaded.factors:
        raise UsageError(f"{adapter} is a model folder; make an adapter with 'spp-fx inject {adapter}'")
    program = loaded.program
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    length = window_length(program, settings.seq_len)
    windows = training_windows(data, tokenizer, length)
    check_vocabulary(windows.tokens, program.config.vocab_size, data)
    held_out = all_windows(eval_data, tokenizer, length) if eval_data else None
    lr = default_rate(loaded) if settings.lr is None else settings.lr
    checkpoint = _checkpoint(adapter, settings)
    before = _evaluate(loaded, held_out)
    guide = _teacher(teacher, program, trust_remote_code) if teacher else None
    trainer = _trainer(adapter, loaded, windows, settings, lr, callbacks or [], guide)
    if checkpoint is None:
        for folder in adapter.glob("checkpoint-*"):
            shutil.rmtree(folder)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    broken = [name for name, value in loaded.factors.items() if not bool(value.isfinite().all())]
    if broken or result.training_loss != result.training_loss:
        raise SppFxError(
            f"training diverged (loss {result.training_loss}); {adapter} stays as it was. Train with a lower --lr "
            f"than {lr:g}"
        )
    with atomic_file(adapter / FACTORS, force=True) as temporary:
        write_factors(temporary, loaded.factors)
    AdapterFolder.open(adapter)
    return Trained(
        adapter=adapter,
        steps=trainer.state.global_step,
        lr=lr,
        seq_len=length,
        loss=result.training_loss,
        seconds=result.metrics["train_runtime"],
        trainable=sum(value.numel() for value in loaded.factors.values()),
        before=before,
        after=_evaluate(loaded, held_out),
    )


def default_rate(loaded: Loaded) -> float:
    """The paper's rate for 7B, 4e-3 at width 4096, scaled like alpha's start: by 1/sqrt(inputs).

    alpha starts as U(-1/sqrt n, 1/sqrt n) and Adam moves every entry by about the rate, so a rate in
    proportion to 1/sqrt(n) moves it by the same share at every width.
    """
    widths = [
        program_site.in_features
        for program_site in map(loaded.program.sites.get, loaded.program.adapters)
        if program_site
    ]
    return PAPER_RATE * sqrt(PAPER_WIDTH / median(widths))


def _check(settings: TrainSettings) -> None:
    if settings.steps is not None and settings.epochs is not None:
        raise UsageError("give --steps or --epochs, not both")
    for name in ("steps", "epochs", "lr", "batch_size", "save_steps"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")


def _checkpoint(adapter: Path, settings: TrainSettings) -> str | None:
    last = get_last_checkpoint(str(adapter))
    if settings.resume:
        if last is None:
            raise UsageError(
                f"{adapter}: nothing to resume, it has no checkpoint; train with --save-steps N to get some"
            )
        return last
    return None


def _teacher(path: Path, student: Program, trust_remote_code: bool) -> Program:
    teacher = load_program(path, trust_remote_code=trust_remote_code).program.eval()
    if teacher.config.vocab_size != student.config.vocab_size:
        raise UsageError(
            f"{path}: its vocabulary has {teacher.config.vocab_size} tokens, the student's "
            f"{student.config.vocab_size}; a teacher must share the tokenizer"
        )
    return teacher.requires_grad_(False)


def _evaluate(loaded: Loaded, windows: list[torch.Tensor] | None) -> Perplexity | None:
    if windows is None:
        return None
    program = loaded.program.eval()
    return perplexity(lambda ids, mask: program(ids, mask).logits, windows)


def _trainer(
    adapter: Path,
    loaded: Loaded,
    windows: Windows,
    settings: TrainSettings,
    lr: float,
    callbacks: list[TrainerCallback],
    teacher: Program | None,
) -> AdapterTrainer:
    set_seed(settings.seed)
    arguments = TrainingArguments(
        output_dir=str(adapter),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 3.0,
        learning_rate=lr,
        per_device_train_batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        logging_steps=10,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
    )
    trainer = AdapterTrainer(
        model=loaded.program,
        factors=loaded.factors,
        teacher=teacher,
        args=arguments,
        train_dataset=windows,
        callbacks=[CutEachEpoch(windows), *callbacks],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
    return trainer
