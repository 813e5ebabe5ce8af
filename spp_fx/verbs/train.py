"""train: update the factors of an adapter folder in place."""

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from spp_fx.adapters.adapter_folder import FACTORS, AdapterFolder, trainable_parameters, write_factors
from spp_fx.errors import SppFxError, UsageError
from spp_fx.graph.program import Program
from spp_fx.storage.links import links_option
from spp_fx.storage.output import atomic_file
from spp_fx.training.distributed import held_bytes, join
from spp_fx.training.losses import Layers, Objective
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.training.records import Skipped
from spp_fx.training.samples import (
    HeldOut,
    Rows,
    Windows,
    check_vocabulary,
    evaluation_rows,
    held_out,
    pad,
    pad_token,
    training_rows,
)
from spp_fx.training.state import OPTIMIZER, checkpoint_step, checkpoints, is_whole, load_state
from spp_fx.training.teacher_cache import CacheText, TaughtRows, TeacherCache, is_cache
from spp_fx.training.trainer import AdapterTrainer, CutEachEpoch, EarlyStop, ReportLast, load_factors
from spp_fx.verbs import rate
from spp_fx.verbs.load import Loaded, check_teacher, load_program, load_tokenizer, window_length
from spp_fx.verbs.settings import TrainSettings


@dataclass(frozen=True)
class Trained:
    """What training did.

    Attributes:
        rows: of an optimizer step, over all processes.
        lr: the peak learning rate.
        lr_trials: losses of the short runs that it was chosen by, by their rates; infinite where one diverged.
        loss: mean over all steps.
        losses: mean between reports, see `TrainSettings.logging_steps`.
        parts: what the loss is made up of, see `training.losses.Objective`: means over all steps, unweighted; None for
            a part that it does not have.
        processes: how many trained together.
        frozen_bytes: of frozen weights that this process holds.
        before, after: of the evaluation data.
        skipped: rows of the training data with nothing to learn.
        eval_skipped: rows of the evaluation data with nothing to measure; None without such data.
    """

    adapter: Path
    steps: int
    rows: int
    lr: float
    lr_trials: dict[float, float]
    seq_len: int
    loss: float
    losses: list[float]
    parts: dict[str, float | None]
    processes: int
    seconds: float
    trainable: int
    frozen_bytes: int
    before: Perplexity | None
    after: Perplexity | None
    skipped: Skipped
    eval_skipped: Skipped | None

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": str(self.adapter),
            "steps": self.steps,
            "lr": self.lr,
            "lr_trials": [
                {"lr": lr, "loss": loss if isfinite(loss) else None}
                for lr, loss in sorted(self.lr_trials.items())
            ],
            "seq_len": self.seq_len,
            "loss": self.loss,
            "losses": self.losses,
            "loss_parts": self.parts,
            "processes": self.processes,
            "seconds": self.seconds,
            "trainable_parameters": self.trainable,
            "frozen_bytes": self.frozen_bytes,
            "perplexity_before": self.before.perplexity if self.before else None,
            "perplexity": self.after.perplexity if self.after else None,
            "skipped_rows": self.skipped.count,
            "eval_skipped_rows": self.eval_skipped.count if self.eval_skipped else None,
        }

    def lines(self) -> Iterator[str]:
        end = f", {self.losses[-1]:.3f} at the end" if self.losses else ""
        yield (
            f"{self.adapter}: {self.steps} steps of {self.rows} x {self.seq_len} tokens in {self.seconds:.0f} s, "
            f"learning rate {self.lr:.3g}, loss {self.loss:.3f} on average{end}"
        )
        if sum(part is not None for part in self.parts.values()) > 1:
            parts = (f"{name} {part:.3f}" for name, part in self.parts.items() if part is not None)
            yield f"loss on average: {', '.join(parts)}"
        if self.before and self.after:
            yield f"perplexity {self.before.perplexity:.2f} -> {self.after.perplexity:.2f}"


@links_option
def train(
    adapter: str | Path,
    data: str | Path,
    settings: TrainSettings,
    *,
    eval_data: str | Path | None = None,
    teacher: str | Path | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train an adapter folder on a file or dataset and replace its factors atomically.

    `eval_data` is read as `data` is; of instructions and chats the perplexity is that of the whole text, see
    `samples.held_out`. Rows with nothing in them are skipped, and `say` reports them.

    Checkpoints (`checkpoint-N`) go into the adapter folder; `resume` continues an interrupted run
    to the same factors that an uninterrupted one reaches. With a `teacher` (the dense model, say, or a folder that
    `teach` made) its distribution is learned instead of the text's own tokens, or both, see `training.losses`.
    Started by torchrun or accelerate launch, every process calls this; `batch_size` is that of each, and the first one
    writes. Training continues from the current factors.

    Raises:
        UsageError: settings or data that cannot be used, nothing to resume.
        SppFxError: the loss is not finite; the adapter stays as it was.
    """
    adapter = Path(adapter)
    if settings.eval_steps and eval_data is None:
        raise UsageError("--eval-steps needs --eval-data to evaluate on")
    cache = _open_teacher(teacher, settings)
    join(shards=settings.shard is not None)
    loaded = load_program(
        adapter,
        base=base,
        trust_remote_code=trust_remote_code,
        packed=settings.packed,
        checkpointed=settings.gradient_checkpointing,
        layers=settings.match_hidden > 0,
        shard=settings.shard,
    )
    if not loaded.factors:
        raise UsageError(f"{adapter} is a model folder; make an adapter with 'spp-fx inject {adapter}'")
    program = loaded.program
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    asked = settings.seq_len
    length = window_length(program, cache.manifest.text.seq_len if cache and asked is None else asked)
    loss_on, packing = settings.loss_on, settings.packing
    rows, skipped = training_rows(
        data, tokenizer, length,
        loss_on=loss_on, packing=packing, strict=settings.strict, fixed=cache is not None,
    )  # fmt: skip
    if line := skipped.line(data):
        say(line)
    check_vocabulary(rows.tokens, program.vocabulary, data)
    if cache is not None:
        text = CacheText.of(
            rows, data, tokenizer, program.vocabulary, seq_len=length, loss_on=loss_on, packing=packing
        )
        cache.check_text(text)
    measured = held_out(eval_data, tokenizer, length, strict=settings.strict) if eval_data else None
    if eval_data and measured:
        if line := measured.skipped.line(eval_data):
            say(line)
        for window in measured.windows:
            check_vocabulary(window, program.vocabulary, eval_data)
    checkpoint = _checkpoint(adapter, settings)
    frozen_bytes = held_bytes(value for value in program.parameters() if not value.requires_grad)
    guide = cache or (_teacher(Path(teacher), program, settings, trust_remote_code) if teacher else None)
    pad_id = pad_token(tokenizer, program.vocabulary)
    lr, trials = settings.lr, {}
    if lr is None and checkpoint is not None:
        lr = _resumed_rate(checkpoint)
    elif lr is None:
        lr, trials = _default_rate(
            adapter, loaded, rows, settings, say,
            lambda short, at: _trainer(adapter, loaded, rows, None, short, at, [], guide, pad_id),
        )  # fmt: skip
    if settings.min_lr > lr:
        raise UsageError(
            f"--min-lr {settings.min_lr:g} is above the learning rate of this run, {lr:g}; lower it, or give --lr"
        )
    trainer = _trainer(adapter, loaded, rows, measured, settings, lr, callbacks or [], guide, pad_id)
    before = _evaluate(loaded, measured, settings)  # where the trainer has put the program
    together = trainer.accelerator
    together.wait_for_everyone()
    if checkpoint is None and together.is_main_process:
        for folder in checkpoints(adapter):
            shutil.rmtree(folder)
    together.wait_for_everyone()
    if checkpoint is not None and checkpoint_step(Path(checkpoint)) >= rate.steps_of(rows, settings):
        result = trainer.take_over(checkpoint)
    else:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    broken = [name for name, value in loaded.factors.items() if not bool(value.isfinite().all())]
    if broken or result.training_loss != result.training_loss:
        raise SppFxError(
            f"training diverged (loss {result.training_loss}); {adapter} is unchanged. Train with a lower --lr "
            f"than {lr:g}"
        )
    if together.is_main_process:
        with atomic_file(adapter / FACTORS, force=True) as temporary:
            write_factors(temporary, loaded.factors)
        AdapterFolder.open(adapter)
    together.wait_for_everyone()
    return Trained(
        adapter=adapter,
        steps=trainer.state.global_step,
        rows=settings.batch_size * settings.accumulate * together.num_processes,
        lr=lr,
        lr_trials=trials,
        seq_len=length,
        loss=result.training_loss,
        losses=[float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        parts=trainer.mean_parts(),
        processes=together.num_processes,
        seconds=result.metrics["train_runtime"],
        trainable=trainable_parameters(loaded.factors),
        frozen_bytes=frozen_bytes,
        before=before,
        after=_evaluate(loaded, measured, settings),
        skipped=skipped,
        eval_skipped=measured.skipped if measured else None,
    )


def _default_rate(
    adapter: Path,
    loaded: Loaded,
    rows: Rows,
    settings: TrainSettings,
    say: Callable[[str], None],
    short_run: Callable[[TrainSettings, float], AdapterTrainer],
) -> tuple[float, dict[float, float]]:
    """The rate where the user gives none, and the losses of the trials that led to it, by their rates.

    Args:
        say: called with what is about to take time.
        short_run: makes the trainer of a trial with a rate.
    """
    steps = rate.steps_of(rows, settings)
    suggestion = rate.suggested(adapter, loaded.program, loaded.model)
    trials: dict[float, float] = {}
    short = rate.trial_steps(steps) if settings.lr_trials else 0
    if short == 0:
        return rate.rounded(suggestion(steps)), trials
    say(
        f"finding a learning rate: 3 to {rate.MOST_TRIALS} trials of {short} steps; --lr or --no-lr-trials skips them"
    )
    trial = replace(
        settings, steps=short, epochs=None, warmup=rate.warmup_share(settings.warmup, steps), min_lr=0.0,
        logging_steps=1, save_steps=None, eval_steps=None, early_stop=None, report_to=(),
    )  # fmt: skip
    start = {name: value.detach().clone() for name, value in loaded.factors.items()}
    untrained: list[float] = []

    def loss(multiple: float) -> float:
        gc.collect()  # trainers refer to themselves; of several processes, each of them listens to the gradients
        lr = rate.rounded(multiple * suggestion(short))
        trainer = short_run(trial, lr)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        untrained.append(losses[0])
        last = losses[-short // 4 :]
        finite = all(bool(value.isfinite().all()) for value in loaded.factors.values())
        load_factors(loaded.factors, start, adapter)
        trials[lr] = sum(last) / len(last) if finite else inf
        return trials[lr]

    multiple = rate.best_multiple(loss)
    gc.collect()
    left = min(trials.values()) / untrained[0] if untrained[0] else 1.0
    return rate.rounded(multiple * rate.carried_over(suggestion(short), suggestion(steps), left)), trials


def _resumed_rate(checkpoint: str) -> float:
    """The peak rate of the run that wrote a checkpoint."""
    (group, *_) = load_state(Path(checkpoint), OPTIMIZER)["optimizer"]["param_groups"]
    return float(group["initial_lr"])


def _checkpoint(adapter: Path, settings: TrainSettings) -> str | None:
    found = checkpoints(adapter)
    if not settings.resume:
        if found and not settings.force:
            raise UsageError(
                f"{adapter}: holds checkpoints of an earlier run (newest: {found[-1].name}); continue "
                "with --resume, or delete them and start over with --force"
            )
        return None
    whole = [folder for folder in found if is_whole(folder)]
    if not whole:
        raise UsageError(
            f"{adapter}: nothing to resume: it has no complete checkpoint; train with --save-steps N to write some"
        )
    return str(whole[-1])


def _open_teacher(teacher: str | Path | None, settings: TrainSettings) -> TeacherCache | None:
    """The teacher's sampled tokens, if that is what it is.

    Raises:
        UsageError: settings of a teacher without one, or those that its sampled tokens do not serve.
    """
    given = {
        "--teacher-weight": settings.teacher_weight is not None,
        "--temperature": settings.temperature is not None,
        "--match-hidden": settings.match_hidden > 0,
    }
    if teacher is None and (unused := [flag for flag, is_given in given.items() if is_given]):
        raise UsageError(f"{unused[0]} needs --teacher, the model to learn from")
    if teacher is None or not is_cache(teacher):
        return None
    cache = TeacherCache.open(Path(teacher))
    if given["--match-hidden"]:
        raise UsageError(
            f"{teacher}: holds sampled tokens; --match-hidden needs the teacher itself, a model folder"
        )
    if settings.temperature not in (None, cache.manifest.temperature):
        raise UsageError(
            f"{teacher}: was sampled at a temperature of {cache.manifest.temperature:g}, --temperature is "
            f"{settings.temperature:g}; leave it out, or run 'spp-fx teach' at that temperature"
        )
    return cache


def _teacher(path: Path, student: Program, settings: TrainSettings, trust_remote_code: bool) -> Program:
    match = settings.match_hidden > 0
    teacher = load_program(
        path, trust_remote_code=trust_remote_code, layers=match, shard=settings.shard
    ).program.eval()
    check_teacher(student, teacher, path)
    if match:
        theirs, ours = (
            f"{len(program.units)} layers of width {Layers.of(program).width}"
            for program in (teacher, student)
        )
        if theirs != ours:
            raise UsageError(
                f"{path}: has {theirs}, the student {ours}; --match-hidden compares layer with layer, so train "
                "without it"
            )
    return teacher.requires_grad_(False)


def _evaluate(loaded: Loaded, measured: HeldOut | None, settings: TrainSettings) -> Perplexity | None:
    if measured is None:
        return None
    program = loaded.program.eval()
    device = program.device
    # A trainer leaves its autocast around the forward once it has trained: before that it would be missing.
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        return perplexity(lambda ids, mask: program(ids.to(device), mask.to(device)).logits, measured.windows)


def _trainer(
    adapter: Path,
    loaded: Loaded,
    rows: Rows,
    measured: HeldOut | None,
    settings: TrainSettings,
    lr: float,
    callbacks: list[TrainerCallback],
    teacher: Program | TeacherCache | None,
    pad_id: int,
) -> AdapterTrainer:
    set_seed(settings.seed)
    given = settings.teacher_weight
    cache = teacher if isinstance(teacher, TeacherCache) else None
    objective = Objective(
        teacher_weight=1.0 if given is None else given,
        temperature=cache.manifest.temperature if cache else settings.temperature or 1.0,
        match_hidden=settings.match_hidden,
    )
    evaluated = evaluation_rows(measured.windows) if settings.eval_steps and measured else None
    arguments = TrainingArguments(
        output_dir=str(adapter),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 3.0,
        learning_rate=lr,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine_with_min_lr" if settings.min_lr else settings.schedule,
        lr_scheduler_kwargs={"min_lr": settings.min_lr} if settings.min_lr else {},
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        logging_steps=min(settings.logging_steps, rate.steps_of(rows, settings)),
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=settings.eval_steps,
        report_to=list(settings.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        # Frozen weights and positions never change: nothing but gradients goes between processes.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    own: list[TrainerCallback] = [ReportLast()]
    if isinstance(rows, Windows):
        own.append(CutEachEpoch(rows))
    if settings.early_stop:
        own.append(EarlyStop(loaded.factors, settings.early_stop))
    trainer = AdapterTrainer(
        model=loaded.program,
        factors=loaded.factors,
        teacher=teacher if isinstance(teacher, Program) else None,
        objective=objective,
        args=arguments,
        train_dataset=TaughtRows(rows, cache) if cache else rows,
        eval_dataset=evaluated,
        data_collator=partial(pad, pad_token=pad_id),
        callbacks=[*own, *callbacks],
    )
    # The data seed distributes the rows; dropout differs between processes.
    torch.manual_seed(settings.seed + trainer.accelerator.process_index)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
    return trainer
