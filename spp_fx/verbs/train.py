"""train: update the factors of an adapter folder in place."""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from spp_fx.adapters.adapter_folder import (
    FACTORS,
    AdapterFolder,
    checkpoints,
    trainable_parameters,
    whole_checkpoints,
    write_factors,
)
from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.program import Program
from spp_fx.graph.task import CAUSAL_LM, LENGTH
from spp_fx.storage.folder import is_adapter
from spp_fx.storage.links import links_option
from spp_fx.storage.output import atomic_file
from spp_fx.storage.strict_json import read_object
from spp_fx.training.distributed import held_bytes, join
from spp_fx.training.losses import LOSS, Layers, Objective
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.training.records import Skipped
from spp_fx.training.samples import (
    HeldOut,
    Windows,
    evaluation_rows,
    pad,
)
from spp_fx.training.state import OPTIMIZER, RECORD, has_losses, load_state
from spp_fx.training.task_rows import HiddenRows, Scored, TaskRows, fixed_names, score
from spp_fx.training.teacher_cache import CacheText, TaughtRows, TeacherCache, is_cache
from spp_fx.training.trainer import AdapterTrainer, CutEachEpoch, EarlyStop, ReportLast, load_factors
from spp_fx.verbs import rate
from spp_fx.verbs.load import (
    Loaded,
    check_teacher,
    is_as_sparse,
    load_program,
    window_length,
)
from spp_fx.verbs.settings import TrainSettings
from spp_fx.verbs.train_data import AnyRows, Texts, TrainingData, read_task, read_text


@dataclass(frozen=True)
class Trained:
    """What training did.

    Attributes:
        rows: of an optimizer step, over all processes.
        seq_len: tokens of a row at most; None for pictures and recordings.
        lr: the peak learning rate.
        lr_trials: losses of the short runs that it was chosen by, by their rates; infinite where one diverged.
        loss: mean over all steps, those before a resumption too.
        losses: mean between reports, see `TrainSettings.logging_steps`.
        parts: what the loss is made up of, see `training.losses.Objective`: means over all steps, unweighted; None for
            a part that it does not have.
        processes: how many trained together.
        seconds, trial_seconds: of the training itself, and of the trials before it.
        frozen_bytes: of frozen weights that this process holds.
        before, after: of the evaluation data: the perplexity of a text, or what the task measures.
        eval_data: its name.
        skipped: rows of the training data with nothing to learn.
        eval_skipped: rows of the evaluation data with nothing to measure; None without such data.
    """

    adapter: Path
    steps: int
    rows: int
    lr: float
    lr_trials: dict[float, float]
    seq_len: int | None
    loss: float
    losses: list[float]
    parts: dict[str, float | None]
    processes: int
    seconds: float
    trial_seconds: float
    trainable: int
    frozen_bytes: int
    before: Perplexity | Scored | None
    after: Perplexity | Scored | None
    eval_data: str | None
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
            "loss": self.loss if isfinite(self.loss) else None,
            "losses": self.losses,
            "loss_parts": self.parts,
            "processes": self.processes,
            "seconds": self.seconds,
            "lr_trial_seconds": self.trial_seconds,
            "trainable_parameters": self.trainable,
            "frozen_bytes": self.frozen_bytes,
            "perplexity_before": self.before.perplexity if self.before else None,
            "perplexity": self.after.perplexity if self.after else None,
            **(
                {"metrics_before": self.before.metrics, "metrics": self.after.metrics}
                if isinstance(self.before, Scored) and isinstance(self.after, Scored)
                else {}
            ),
            "skipped_rows": self.skipped.count,
            "eval_skipped_rows": self.eval_skipped.count if self.eval_skipped else None,
        }

    def lines(self) -> Iterator[str]:
        end = f", {self.losses[-1]:.3f} at the end" if len(self.losses) > 1 else ""
        size = "rows" if self.seq_len is None else f"x {self.seq_len} tokens"
        trials = f" after {self.trial_seconds:.0f} s of trials" if self.lr_trials else ""
        yield (
            f"{self.adapter}: {self.steps} steps of {self.rows} {size} in {self.seconds:.0f} s"
            f"{trials}, learning rate {self.lr:.3g}, loss {self.loss:.3f} on average{end}"
        )
        if sum(part is not None for part in self.parts.values()) > 1:
            parts = (f"{name} {part:.3f}" for name, part in self.parts.items() if part is not None)
            yield f"loss on average: {', '.join(parts)}"
        if isinstance(self.before, Scored) and isinstance(self.after, Scored):
            pairs = ((name, value, self.after.metrics[name]) for name, value in self.before.metrics.items())
            changes = ", ".join(f"{name} {before:.4g} -> {after:.4g}" for name, before, after in pairs)
            yield f"{self.eval_data}: {changes}"
        elif isinstance(self.before, Perplexity) and isinstance(self.after, Perplexity):
            text = f"{self.eval_data} in windows of {self.seq_len} tokens"
            yield f"perplexity of {text}: {self.before.perplexity:.2f} -> {self.after.perplexity:.2f}"


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
    _check_reports(settings.report_to)
    cache = _open_teacher(teacher, settings)
    AdapterFolder.open(adapter)  # refused before the processes join
    checkpoint = _checkpoint(adapter, settings)
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
    asked = settings.seq_len
    length = window_length(loaded.program, cache.manifest.text.seq_len if cache and asked is None else asked)
    texts = Texts(data, eval_data, length, settings, fixed=cache is not None)
    if loaded.program.task.name == CAUSAL_LM:
        read = read_text(loaded, texts, trust_remote_code, say)
    else:
        read = read_task(loaded, texts, cache, teacher is not None, trust_remote_code, say)
    if cache is not None:
        assert not isinstance(read.rows, TaskRows)
        assert read.tokenizer is not None
        text = CacheText.of(
            read.rows, data, read.tokenizer, loaded.program.vocabulary,
            seq_len=length, loss_on=settings.loss_on, packing=settings.packing,
        )  # fmt: skip
        cache.check_text(text)
    # Hidden states are read off its layers, so a program for other sizes takes its place from here on.
    loaded = replace(loaded, program=loaded.program.at(**read.sizes))
    program, rows, measured = loaded.program, read.rows, read.measured
    frozen_bytes = held_bytes(value for value in program.parameters() if not value.requires_grad)
    if teacher and _knows_no_more(Path(teacher), adapter, loaded.model, cache):
        say(
            f"{teacher}: is as sparse as the model being trained and may know no more than it; the usual teacher is "
            "the dense model that was pruned"
        )
    guide = cache or (
        _teacher(Path(teacher), loaded, settings, read.sizes, trust_remote_code) if teacher else None
    )
    lr, trials, began = settings.lr, {}, perf_counter()
    record = _record(settings, data, teacher, length)
    if checkpoint is not None:
        lr = _resumed_rate(checkpoint, settings)
        if line := _changes(checkpoint, record):
            say(line)
        if not has_losses(checkpoint):
            say(f"{checkpoint}: has no sums of its losses; their averages are those of the steps after it")
    elif lr is None:
        lr, trials = _default_rate(
            adapter, loaded, rows, settings, say,
            lambda short, at: _trainer(adapter, loaded, replace(read, measured=None), short, at, [], guide),
        )  # fmt: skip
    if settings.min_lr > lr:
        raise UsageError(
            f"--min-lr {settings.min_lr:g} is above the learning rate of this run, {lr:g}; lower it, or give --lr"
        )
    trial_seconds = perf_counter() - began
    trainer = _trainer(adapter, loaded, read, settings, lr, callbacks or [], guide, record)
    before = _evaluate(loaded, read, settings, guide)  # where the trainer has put the program
    together = trainer.accelerator
    together.wait_for_everyone()
    if checkpoint is None and together.is_main_process:
        for folder in checkpoints(adapter):
            shutil.rmtree(folder)
    together.wait_for_everyone()
    seconds = trainer.run(checkpoint, rate.steps_of(rows, settings))
    if broken := [name for name, value in loaded.factors.items() if not bool(value.isfinite().all())]:
        raise SppFxError(
            f"training diverged: {len(broken)} of {len(loaded.factors)} factors hold NaN or infinity (first: "
            f"{broken[0]}); {adapter} is unchanged. Train with a lower --lr than {lr:g}"
        )
    means = trainer.means()
    if together.is_main_process:
        with atomic_file(adapter / FACTORS, force=True) as temporary:
            write_factors(temporary, loaded.factors)
        AdapterFolder.open(adapter).finish()
    together.wait_for_everyone()
    return Trained(
        adapter=adapter,
        steps=trainer.state.global_step,
        rows=settings.batch_size * settings.accumulate * together.num_processes,
        lr=lr,
        lr_trials=trials,
        seq_len=length if LENGTH in read.sizes else None,
        loss=nan if (loss := means.pop(LOSS)) is None else loss,
        losses=[float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        parts=means,
        processes=together.num_processes,
        seconds=seconds,
        trial_seconds=trial_seconds if trials else 0.0,
        trainable=trainable_parameters(loaded.factors),
        frozen_bytes=frozen_bytes,
        before=before,
        after=_evaluate(loaded, read, settings, guide),
        eval_data=str(eval_data) if measured else None,
        skipped=read.skipped,
        eval_skipped=read.eval_skipped,
    )


def _default_rate(
    adapter: Path,
    loaded: Loaded,
    rows: AnyRows,
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
    if not settings.lr_trials:
        return rate.rounded(suggestion(steps)), {}
    short, searches = rate.trial_steps(steps), steps >= rate.FEWEST_STEPS
    count = f"3 to {rate.MOST_TRIALS} trials" if searches else "a trial"
    say(f"finding a learning rate: {count} of {short} steps; --lr or --no-lr-trials skips them")
    trial = replace(
        settings, steps=short, epochs=None, warmup=rate.warmup_share(settings.warmup, steps), min_lr=0.0,
        logging_steps=1, save_steps=None, eval_steps=None, early_stop=None, report_to=(),
    )  # fmt: skip
    start = {name: value.detach().clone() for name, value in loaded.factors.items()}
    untrained: list[float] = []

    def run(lr: float) -> rate.Trial:
        gc.collect()  # trainers refer to themselves; of several processes, each of them listens to the gradients
        trainer = short_run(trial, lr)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        last = losses[-short // 4 :]
        finite = all(bool(value.isfinite().all()) for value in loaded.factors.values())
        held = trainer.held_loss()
        load_factors(loaded.factors, start, adapter)
        if not untrained:
            untrained.extend((losses[0], trainer.held_loss()))
        return rate.Trial(lr, sum(last) / len(last) if finite else inf, untrained[1] - held)

    found, trials = rate.find(lambda multiple: run(rate.rounded(multiple * suggestion(short))), searches)
    gc.collect()
    losses = {each.lr: each.loss for each in trials}
    left = min(losses.values()) / untrained[0] if untrained[0] else 1.0
    return rate.rounded(found * rate.carried_over(suggestion(short), suggestion(steps), left)), losses


def _resumed_rate(checkpoint: Path, settings: TrainSettings) -> float:
    """The peak rate of the run that wrote a checkpoint.

    Raises:
        UsageError: another rate or weight decay is asked for; those of the optimizer's saved state go on.
    """
    (group, *_) = load_state(checkpoint, OPTIMIZER)["optimizer"]["param_groups"]
    kept = {
        "--lr": (settings.lr, group["initial_lr"]),
        "--weight-decay": (settings.weight_decay, group["weight_decay"]),
    }
    for flag, (asked, held) in kept.items():
        if asked not in (None, held):
            raise UsageError(
                f"{checkpoint}: was trained with {flag} {held:g}, which a resumed run keeps; {asked:g} needs a new run "
                "(--force)"
            )
    return float(group["initial_lr"])


_FREE = {
    "lr", "lr_trials", "weight_decay", "batch_size", "accumulate", "packed", "gradient_checkpointing", "shard",
    "save_steps", "eval_steps", "early_stop", "logging_steps", "report_to", "resume", "force", "strict",
}  # fmt: skip
"""Settings that a resumed run may change without becoming another run, or that are checked by themselves."""


def _record(
    settings: TrainSettings, data: str | Path, teacher: str | Path | None, seq_len: int
) -> dict[str, Any]:
    """What determines a run, as its checkpoints keep it."""
    own = {name: value for name, value in vars(settings).items() if name not in _FREE}
    given = {"data": data, "teacher": teacher}
    # A path as a whole, since the run may go on from another folder; of a dataset of the hub, its name.
    texts = {
        key: None if name is None else str(Path(name).resolve() if Path(name).exists() else name)
        for key, name in given.items()
    }
    rows = settings.batch_size * settings.accumulate * PartialState().num_processes
    return texts | own | {"seq_len": seq_len, "rows of a step": rows}


def _changes(checkpoint: Path, record: dict[str, Any]) -> str | None:
    """How a run differs from the one that wrote a checkpoint; None where it does not."""
    if not (checkpoint / RECORD).is_file():
        return (
            f"{checkpoint}: has no {RECORD} with the settings of its run; it continues with those given now"
        )
    before = read_object(checkpoint / RECORD)
    changed = [
        f"{name.replace('_', '-')} {value} instead of {before.get(name)}"
        for name, value in record.items()
        if value != before.get(name)
    ]
    if not changed:
        return None
    return (
        f"{checkpoint}: the run continues with {', '.join(changed)}; the result will differ from that of an "
        "uninterrupted run with either"
    )


def _checkpoint(adapter: Path, settings: TrainSettings) -> Path | None:
    found = checkpoints(adapter)
    if not settings.resume:
        if found and not settings.force:
            raise UsageError(
                f"{adapter}: holds checkpoints of an earlier run (newest: {found[-1].name}); continue "
                "with --resume, or delete them and start over with --force"
            )
        return None
    whole = whole_checkpoints(adapter)
    if not whole:
        raise UsageError(
            f"{adapter}: nothing to resume: it has no complete checkpoint; train with --save-steps N to write some"
        )
    return whole[-1]


def _check_reports(names: Sequence[str]) -> None:
    """UsageError for a service that transformers does not know, or whose package is not installed."""
    try:
        for made in get_reporting_integration_callbacks(
            [name for name in names if name not in ("all", "none")]
        ):
            made()
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--report-to: {error}") from error


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
    if teacher is None:
        return None
    if settings.teacher_weight == 0 and not given["--match-hidden"]:
        raise UsageError(
            "--teacher-weight 0 learns nothing from --teacher; leave both out, or give --match-hidden or another weight"
        )
    if not is_cache(teacher):
        path = Path(teacher)
        (AdapterFolder.open if is_adapter(path) else open_model)(path)  # refused before the student is loaded
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


def _teacher(
    path: Path, learner: Loaded, settings: TrainSettings, sizes: dict[str, int], trust_remote_code: bool
) -> Program:
    match, task = settings.match_hidden > 0, learner.program.task.name
    loaded = load_program(
        path, trust_remote_code=trust_remote_code, layers=match, shard=settings.shard, task=task
    )
    teacher, student = loaded.program.at(**sizes).eval(), learner.program
    check_teacher(student, teacher, learner.model, loaded.model, trust_remote_code=trust_remote_code)
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


def _knows_no_more(teacher: Path, adapter: Path, base: Path, cache: TeacherCache | None) -> bool:
    """Whether a teacher is the pruned model that an adapter belongs to, or has its zeros."""
    folder = AdapterFolder.open(adapter)
    if cache is not None:
        return cache.manifest.fingerprint == folder.config.base_model_fingerprint
    if is_adapter(teacher):
        teacher = AdapterFolder.open(teacher).find_base()
    return is_as_sparse(open_model(teacher), open_model(base), list(folder.lock.by_name()))


def _evaluate(
    loaded: Loaded, read: TrainingData, settings: TrainSettings, teacher: Program | TeacherCache | None
) -> Perplexity | Scored | None:
    if read.measured is None:
        return None
    program = loaded.program.eval()
    device = program.device
    # A trainer leaves its autocast around the forward once it has trained: before that it would be missing.
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        if isinstance(read.measured, HeldOut):
            return perplexity(
                lambda ids, mask: program(ids.to(device), mask.to(device)).logits, read.measured.windows
            )

        def answer(of: Program, batch: dict[str, Tensor]) -> Any:
            return of(**{name: value.to(device) for name, value in batch.items()})

        guide = partial(answer, teacher) if isinstance(teacher, Program) else None
        return score(
            program, read.measured, partial(answer, program), read.pad_id,
            reference=guide, batch_size=settings.batch_size, least=read.least,
        )  # fmt: skip


def _trainer(
    adapter: Path,
    loaded: Loaded,
    read: TrainingData,
    settings: TrainSettings,
    lr: float,
    callbacks: list[TrainerCallback],
    teacher: Program | TeacherCache | None,
    record: dict[str, Any] | None = None,
) -> AdapterTrainer:
    set_seed(settings.seed)
    rows, measured = read.rows, read.measured
    given = settings.teacher_weight
    cache = teacher if isinstance(teacher, TeacherCache) else None
    objective = Objective(
        teacher_weight=1.0 if given is None else given,
        temperature=cache.manifest.temperature if cache else settings.temperature or 1.0,
        match_hidden=settings.match_hidden,
    )
    evaluated = None
    if settings.eval_steps and measured:
        evaluated = evaluation_rows(measured.windows) if isinstance(measured, HeldOut) else measured
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
        label_names=None if "labels" in rows[0] else [],
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        # Frozen weights and positions never change: nothing but gradients goes between processes.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    own: list[TrainerCallback] = [ReportLast()]
    if isinstance(rows, Windows | HiddenRows):
        own.append(CutEachEpoch(rows))
    if settings.early_stop:
        own.append(EarlyStop(loaded.factors, settings.early_stop))
    trainer = AdapterTrainer(
        model=loaded.program,
        factors=loaded.factors,
        teacher=teacher if isinstance(teacher, Program) else None,
        objective=objective,
        record=record,
        args=arguments,
        train_dataset=rows if cache is None or isinstance(rows, TaskRows) else TaughtRows(rows, cache),
        eval_dataset=evaluated,
        data_collator=partial(
            pad, pad_token=read.pad_id, least=read.least, fixed=fixed_names(loaded.program)
        ),
        callbacks=[*own, *callbacks],
    )
    # The data seed distributes the rows; dropout differs between processes.
    torch.manual_seed(settings.seed + trainer.accelerator.process_index)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
    return trainer
