"""What train reads: rows to train on and rows to measure, of a text or of another task's records."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.graph.sizes import sizes_in
from spp_fx.graph.task import BATCH, LENGTH, TEXT_INPUTS
from spp_fx.training.records import Skipped
from spp_fx.training.samples import HeldOut, Rows, check_vocabulary, held_out, pad, pad_token, training_rows
from spp_fx.training.task_rows import TaskRows, fixed_names, task_rows
from spp_fx.training.teacher_cache import TeacherCache
from spp_fx.training.trainer import MASK
from spp_fx.verbs.load import Loaded, load_processor, load_tokenizer, tokenizer_of
from spp_fx.verbs.settings import TrainSettings

AnyRows = Rows | TaskRows


@dataclass(frozen=True)
class Texts:
    """What to read, and how; `fixed` as `samples.Windows` has it."""

    data: str | Path
    eval_data: str | Path | None
    length: int
    settings: TrainSettings
    fixed: bool


@dataclass(frozen=True)
class TrainingData:
    """The rows to train on and to measure.

    Attributes:
        pad_id: the token that rows are filled with.
        least: tokens that a batch has at least: a program that holds for some lengths only would be traced for each.
        sizes: of a batch, by the names of axes.
    """

    rows: AnyRows
    measured: HeldOut | TaskRows | None
    skipped: Skipped
    eval_skipped: Skipped | None
    tokenizer: PreTrainedTokenizerBase | None
    pad_id: int
    least: int
    sizes: dict[str, int]


def read_text(
    loaded: Loaded, texts: Texts, trust_remote_code: bool, say: Callable[[str], None]
) -> TrainingData:
    """The rows of a causal language model."""
    program, settings, length = loaded.program, texts.settings, texts.length
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    rows, skipped = training_rows(
        texts.data, tokenizer, length,
        loss_on=settings.loss_on, packing=settings.packing, strict=settings.strict, fixed=texts.fixed,
    )  # fmt: skip
    if line := skipped.line(texts.data):
        say(line)
    check_vocabulary(rows.tokens, program.vocabulary, texts.data)
    measured = (
        held_out(texts.eval_data, tokenizer, length, strict=settings.strict) if texts.eval_data else None
    )
    if texts.eval_data and measured:
        if line := measured.skipped.line(texts.eval_data):
            say(line)
        for window in measured.windows:
            check_vocabulary(window, program.vocabulary, texts.eval_data)
    sizes = {BATCH: settings.batch_size, LENGTH: length}
    least = 0 if program.at(**sizes).sizes.cover(settings.batch_size, length) else length
    pad_id = pad_token(tokenizer, program.vocabulary)
    eval_skipped = measured.skipped if measured else None
    return TrainingData(rows, measured, skipped, eval_skipped, tokenizer, pad_id, least, sizes)


def read_task(
    loaded: Loaded,
    texts: Texts,
    cache: TeacherCache | None,
    taught: bool,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> TrainingData:
    """The rows of a model of another task.

    Raises:
        UsageError: an option that is for language models only.
    """
    program, settings, length = loaded.program, texts.settings, texts.length
    task = program.task.name
    names = [entry.name for entry in program.inputs]
    refused = {
        "--packing": settings.packing,
        "--loss-on answer": settings.loss_on != "all",
        "--teacher with sampled tokens": cache is not None,
        "--match-hidden": settings.match_hidden > 0 and not (MASK in names and TEXT_INPUTS.issuperset(names)),
    }
    if given := [flag for flag, asked in refused.items() if asked]:
        raise UsageError(f"{given[0]} is not for {task}, and {loaded.model} is a model for that")
    processor = load_processor(loaded.model, program, trust_remote_code=trust_remote_code)
    read = partial(
        task_rows,
        model=program,
        processor=processor,
        length=length,
        strict=settings.strict,
        seed=settings.seed,
    )
    rows, skipped = read(texts.data)
    if line := skipped.line(texts.data):
        say(line)
    measured, eval_skipped = read(texts.eval_data) if texts.eval_data else (None, None)
    if texts.eval_data and eval_skipped and (line := eval_skipped.line(texts.eval_data)):
        say(line)
    if "labels" not in rows[0] and (not taught or settings.teacher_weight not in (None, 1)):
        raise UsageError(
            f"{task} has no labels: give --teacher, the model to learn from, and no --teacher-weight"
        )
    tokenizer = tokenizer_of(processor)
    own = getattr(program.config.get_text_config(), "pad_token_id", None)
    pad_id = 0 if tokenizer is None else pad_token(tokenizer, program.vocabulary, own)
    first = pad(
        [rows[n % len(rows)] for n in range(settings.batch_size)], pad_id, length, fixed_names(program)
    )
    sizes = sizes_in(program.inputs, first)
    least = 0 if program.sizes.cover(settings.batch_size, length) else length
    return TrainingData(rows, measured, skipped, eval_skipped, tokenizer, pad_id, least, sizes)
