"""eval: perplexity of a text and scores of tasks, for models, adapters over their base, and exports."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.console import Table
from spp_fx.errors import UsageError
from spp_fx.exporters.manifest import MANIFEST, open_model, read_manifest
from spp_fx.graph.model import check_task, folder_task, load_model
from spp_fx.graph.program import Program
from spp_fx.graph.reserved_names import shown
from spp_fx.graph.task import (
    CAUSAL_LM,
    LENGTH,
    TARGET,
    EagerModel,
    Task,
    find_task,
    positions_of,
    vocabulary_of,
)
from spp_fx.parallel import Tick, no_tick
from spp_fx.runtime import load as load_export
from spp_fx.storage.folder import is_adapter
from spp_fx.storage.links import links_option
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.training.records import Skipped
from spp_fx.training.samples import check_vocabulary, held_out, pad_token
from spp_fx.training.task_rows import Scored, score, score_writing, task_rows
from spp_fx.training.tasks import Scores, Tasks, find_tasks, number, run_tasks
from spp_fx.verbs.load import (
    check_teacher,
    device_of,
    fit_length,
    load_processor,
    load_program,
    load_tokenizer,
    tokenizer_of,
)
from spp_fx.verbs.settings import EvaluateSettings

FEATURES = "feature-extraction"
FEW_WINDOWS = 10
"""Below so many windows of text a perplexity is rough."""


@dataclass(frozen=True)
class Measured:
    """Perplexity of a text, and how it was measured.

    Attributes:
        data: the file or dataset.
        stride: tokens from one window to the next.
        skipped: rows of the data that hold nothing to measure.
    """

    data: str
    seq_len: int
    stride: int
    result: Perplexity
    skipped: Skipped

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "perplexity": self.result.perplexity,
            "loss": self.result.loss,
            "tokens": self.result.tokens,
            "windows": self.result.windows,
            "skipped_rows": self.skipped.count,
            "seq_len": self.seq_len,
            "stride": self.stride,
        }


@dataclass(frozen=True)
class Answered:
    """How right a model's answers on the records of its own task are, and how it was measured.

    Attributes:
        task: its name.
        seq_len: tokens of a row at most, or of the text that a decoder should write; None for pictures alone.
        skipped: records that hold nothing to measure.
    """

    task: str
    data: str
    seq_len: int | None
    result: Scored
    skipped: Skipped

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "data": self.data,
            "rows": self.result.rows,
            "loss": self.result.loss,
            **self.result.metrics,
            "skipped_rows": self.skipped.count,
            "seq_len": self.seq_len,
        }


@dataclass(frozen=True)
class Evaluated:
    """What one model reached: on a text or the records of its task, on tasks, or both.

    Attributes:
        text, scores: None where there was no data, no tasks.
    """

    model: Path
    text: Measured | Answered | None
    scores: Scores | None
    seconds: float

    @property
    def result(self) -> Perplexity:
        """The perplexity of the text."""
        if not isinstance(self.text, Measured):
            raise ValueError("evaluate measured no text: give it data")
        return self.text.result

    def to_json(self) -> dict[str, Any]:
        tasks = self.scores and {"tasks": self.scores.to_json(), "mean_accuracy": self.scores.mean_accuracy}
        return (
            {"model": str(self.model)}
            | (self.text.to_json() if self.text else {})
            | (tasks or {})
            | {"seconds": self.seconds}
        )

    def lines(self) -> Iterator[str | Table]:
        if isinstance(self.text, Answered):
            found = self.text.result
            values = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
            yield f"{values} over {found.rows:,} rows"
        elif self.text:
            result, step = (
                self.text.result,
                f", {self.text.stride} apart" * (self.text.stride < self.text.seq_len),
            )
            yield (
                f"perplexity {result.perplexity:.2f} over {result.tokens:,} tokens "
                f"({_windows(result.windows)} of {self.text.seq_len}{step})"
            )
        if self.scores:
            yield Table(("task", "shots", "metric", "value", "stderr"), list(self.scores.rows()))
            if (mean := self.scores.mean_accuracy) is not None:
                yield f"mean accuracy {mean:.4f}"


@dataclass(frozen=True)
class Compared:
    """Several models on the same text and tasks."""

    models: tuple[Evaluated, ...]

    def to_json(self) -> dict[str, Any]:
        return {"models": [each.to_json() for each in self.models]}

    def lines(self) -> Iterator[str | Table]:
        headings, rows = ["model"], [[str(each.model)] for each in self.models]
        if isinstance(first := self.models[0].text, Answered):
            headings += list(first.result.metrics)
            for row, each in zip(rows, self.models, strict=True):
                assert isinstance(each.text, Answered)
                row += [f"{each.text.result.metrics[name]:.4f}" for name in first.result.metrics]
        elif first:
            headings += ["perplexity", "tokens"]
            for row, each in zip(rows, self.models, strict=True):
                row += [f"{each.result.perplexity:.2f}", f"{each.result.tokens:,}"]
        if scores := self.models[0].scores:
            mean = scores.mean_accuracy is not None
            headings += [f"{name} {scores.main(name).partition(',')[0]}" for name in scores.names]
            headings += ["mean"] * mean
            for row, each in zip(rows, self.models, strict=True):
                own = each.scores
                assert own is not None
                row += [number(own.metrics[name][own.main(name)]) for name in own.names]
                row += [number(own.mean_accuracy)] * mean
        yield Table(headings, rows)


def _windows(count: int) -> str:
    return f"{count} window{'s' * (count != 1)}"


@links_option
def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    batch_size: str = "1",
    task: str | None = None,
    teacher: str | Path | None = None,
    generate: bool = False,
    base: str | Path | None = None,
    device: str | None = None,
    strict: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluated:
    """Perplexity of a text and scores of tasks under a model folder, an adapter folder or an export.

    An adapter is folded into its base in memory: the numbers are those of the folder that `merge` writes.
    Instructions and chats are measured as the whole text that the model would see, the prompt like the answer.

    Args:
        data: a text file, .json or .jsonl records, or the name of a dataset of the hub, as for `train`.
        stride: tokens from one window of the text to the next: each predicts only its last `stride` tokens, and the
            first one all of its own. By default `seq_len`: windows do not overlap, each predicts from its own start.
        tasks: of lm-evaluation-harness, by name or file; see `training.tasks.find_tasks`.
        limit: documents of a task at most.
        shots: examples in a task's prompt; None: as the papers and the harness have it.
        batch_size: rows of a task in one forward, or "auto".
        task: what the model is for; None: what its configuration says, or the adapter.
        teacher: of feature-extraction, the model whose embeddings those of this one are compared with.
        generate: let the model write its texts, of `seq_len` tokens at most, and compare them with the data's: BLEU
            (seq2seq-lm), word error rate (speech-seq2seq).
        base: the base model of an adapter, if it is not where the adapter says.
        device: where the model runs; by default a GPU if torch has one.
        strict: rows with nothing in them are an error; else they are skipped, counted, and reported by `say`.

    Raises:
        UsageError: the text, the tasks or the model cannot be used.
    """
    settings = EvaluateSettings(
        data=None if data is None else str(data), tasks=tuple(tasks), limit=limit, shots=shots,
        batch_size=batch_size, seq_len=seq_len, stride=stride, strict=strict,
        base=None if base is None else Path(base), device=device,
        task=task, teacher=None if teacher is None else Path(teacher), generate=generate,
    )  # fmt: skip
    done = evaluate_all([model], settings, trust_remote_code=trust_remote_code, tick=tick, say=say)
    return done.models[0]


@links_option
def evaluate_all(
    models: Sequence[str | Path],
    settings: EvaluateSettings,
    *,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Callable[[str], None] = lambda line: None,
) -> Compared:
    """`evaluate` for several models, one after the other; one is in memory at a time.

    Raises:
        UsageError: as `evaluate`. Folders and tasks are checked before the first model is loaded.
    """
    told: set[str] = set()

    def say_once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    device = device_of(settings.device)
    paths = [Path(model) for model in models]
    if settings.base is not None and not any(is_adapter(path) for path in paths):
        raise UsageError("--base names the base of an adapter, and no MODEL is an adapter; leave it out")
    for path in paths:
        _check(path, settings)
    found = [_task(path, settings, trust_remote_code) for path in paths]
    kinds = {"none" if task is None else task.name for task in found}
    if settings.generate and not all(task is not None and task.writes for task in found):
        raise UsageError(
            "--generate is for models that write a text about their input (seq2seq-lm, speech-seq2seq), "
            f"not for {', '.join(sorted(kinds))}"
        )
    if len(kinds) > 1:
        raise UsageError(
            f"the models are for several tasks ({', '.join(sorted(kinds))}); evaluate those of one"
        )
    tasks = find_tasks(settings.tasks, settings.shots) if settings.tasks else None
    done: list[Evaluated] = []
    for path in paths:
        done.append(_evaluate(path, settings, tasks, device, trust_remote_code, tick, say_once))
        # A model is cyclic garbage: without this, two would be in memory.
        gc.collect()
    return Compared(tuple(done))


def _evaluate(
    path: Path,
    settings: EvaluateSettings,
    tasks: Tasks | None,
    device: torch.device,
    trust_remote_code: bool,
    tick: Tick,
    say: Callable[[str], None],
) -> Evaluated:
    begin = perf_counter()
    if is_adapter(path) and (line := AdapterFolder.open(path).unfinished()):
        say(line)
    model, home = load_evaluated(path, settings.base, device, trust_remote_code, settings.task)
    task = _task(path, settings, trust_remote_code)
    text = scores = None
    if task is not None and task.name != CAUSAL_LM:
        if tasks is not None:
            raise UsageError(
                f"{path}: --tasks are for causal language models, and this is one for {task.name}"
            )
        text = _answer(EagerModel(task, model), home, settings, device, trust_remote_code, tick, say)
        return Evaluated(path, text, None, perf_counter() - begin)
    tokenizer = load_tokenizer(home, trust_remote_code=trust_remote_code)
    if settings.data is not None:
        text = _measure(model, tokenizer, settings.data, settings, tick, say)
    if tasks is not None:
        scores = run_tasks(
            model, tokenizer, tasks, limit=settings.limit, batch_size=settings.batch_size,
            tick=lambda count: tick(f"{path.name}: rows of tasks", count),
        )  # fmt: skip
    return Evaluated(path, text, scores, perf_counter() - begin)


def _task(path: Path, settings: EvaluateSettings, trust_remote_code: bool) -> Task | None:
    """What a folder's model is run for; None if its class is of no task that is known."""
    if settings.task is not None and (is_adapter(path) or is_export(path)):
        raise UsageError(
            f"{path}: --task is for model folders: an adapter or an export has a task of its own"
        )
    if is_adapter(path):
        return find_task(AdapterFolder.open(path).config.task)
    return folder_task(path, settings.task, trust_remote_code=trust_remote_code)


def _answer(
    model: EagerModel,
    home: Path,
    settings: EvaluateSettings,
    device: torch.device,
    trust_remote_code: bool,
    tick: Tick,
    say: Callable[[str], None],
) -> Answered:
    """Measure a model on the records of its task.

    Args:
        home: the folder of its tokenizer or processor.
    """
    data = str(settings.data)
    if settings.teacher is not None and model.task.name != FEATURES:
        raise UsageError(f"--teacher is for feature-extraction, and this is a model for {model.task.name}")
    if settings.stride is not None:
        raise UsageError("--stride is for the text of causal language models")
    length = fit_length(model.positions, settings.seq_len)
    processor = load_processor(home, model, trust_remote_code=trust_remote_code)
    rows, skipped = task_rows(data, model, processor, length=length, strict=settings.strict)
    if line := skipped.line(data):
        say(line)
    tokenizer, teacher = tokenizer_of(processor), None
    own = getattr(model.config.get_text_config(), "pad_token_id", None)
    if settings.teacher is not None:
        name = model.task.name
        guide, theirs = load_evaluated(settings.teacher, None, device, trust_remote_code, name)
        teacher = EagerModel(model.task, guide)
        check_teacher(model, teacher, home, theirs, trust_remote_code=trust_remote_code)
    result = score(
        model, rows, model.answer, 0 if tokenizer is None else pad_token(tokenizer, model.vocabulary, own),
        reference=None if teacher is None else teacher.answer, tick=lambda count: tick("rows", count),
    )  # fmt: skip
    if settings.generate:
        assert tokenizer is not None  # what is written was encoded with it
        found = score_writing(
            model, rows, tokenizer, length=length, tick=lambda count: tick("written texts", count)
        )
        result = replace(result, metrics=result.metrics | found)
    texts = any(axis in entry.axes for entry in model.inputs for axis in (LENGTH, TARGET))
    return Answered(model.task.name, data, length if texts else None, result, skipped)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    settings: EvaluateSettings,
    tick: Tick,
    say: Callable[[str], None],
) -> Measured:
    length = fit_length(positions_of(model), settings.seq_len)
    text = held_out(data, tokenizer, length, stride=settings.stride, strict=settings.strict)
    if line := text.skipped.line(data):
        say(line)
    for window in text.windows:
        check_vocabulary(window, vocabulary_of(model.config), data)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        placed = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        return model(**placed, use_cache=False).logits

    result = perplexity(logits, text.windows, lambda count: tick("windows", count), overlap=text.overlap)
    # With overlap, most of a window was read in others.
    count = -(-result.tokens // length) if text.overlap else result.windows
    if count < FEW_WINDOWS:
        say(
            f"{data}: warning: the perplexity of {_windows(count)} of text is rough ({result.tokens:,} predicted "
            f"tokens); use a longer text, of at least {FEW_WINDOWS} windows of {length}"
        )
    return Measured(data, length, length - text.overlap, result, text.skipped)


def load_evaluated(
    folder: Path,
    base: Path | None,
    device: torch.device,
    trust_remote_code: bool = False,
    task: str | None = None,
) -> tuple[PreTrainedModel, Path]:
    """The transformers model of a model folder, an adapter folder or an export, and the folder of its tokenizer.

    Of an adapter it is the base with the folded weights: to the bit those that `merge` writes.
    """
    if is_export(folder):
        return load_export(folder, device=device, trust_remote_code=trust_remote_code), folder
    chosen = None if task is None else find_task(task)
    if not is_adapter(folder):
        return load_model(folder, task=chosen, trust_remote_code=trust_remote_code).to(device).eval(), folder  # type: ignore[arg-type]
    adapter = AdapterFolder.open(folder)
    home = adapter.find_base(base)
    model = load_model(home, task=find_task(adapter.config.task), trust_remote_code=trust_remote_code)
    loaded = load_program(folder, base=home, source=model, folded=True, trust_remote_code=trust_remote_code)
    _give_back(loaded.program, model)
    return model.to(device).eval(), home  # type: ignore[arg-type]


def _give_back(program: Program, model: PreTrainedModel) -> None:
    """Give a model the weights of its program where a pass has replaced the parameter, not only its values."""
    made = {shown(name): value for name, value in program.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if made[name] is not parameter:
                parameter.copy_(made[name])


def is_export(folder: Path) -> bool:
    """Whether a folder is an export that transformers cannot load by itself."""
    return (folder / MANIFEST).is_file() and read_manifest(folder).format != "safetensors"


def _check(folder: Path, settings: EvaluateSettings) -> None:
    """UsageError or FormatError before any work for a folder that cannot be evaluated."""
    if is_adapter(folder):
        adapter = AdapterFolder.open(folder)
        home = adapter.find_base(settings.base)
        adapter.check_base(open_model(home))
    elif not is_export(folder):
        open_model(folder)
        if settings.task is None:
            check_task(folder, "eval")
