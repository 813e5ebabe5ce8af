"""The data of tasks other than language modelling as rows, and how far a model's answers are right on them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.graph.task import FRAMES, LENGTH, TARGET, EagerModel, Row, Task, TaskModel
from spp_fx.training.records import Skip, Skipped, keep, needed, read_records, read_samples
from spp_fx.training.samples import IGNORED, check_vocabulary, pad, pad_token, token_stream

MASKED_LM = "masked-lm"
HIDDEN_SHARE = 0.15
"""Of the tokens, that are hidden: of those 80 % become the mask, 10 % another token, 10 % stay; Devlin et al., 2018."""


class TaskRows(torch.utils.data.Dataset[Row]):
    """Rows of a task, in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class HiddenRows(TaskRows):
    """Windows of text in which some tokens are hidden, others in every epoch.

    Which are is a function of the epoch and the row, so a resumed run sees what an uninterrupted one would.

    Args:
        rows: with `input_ids` (length,) int64.
        seed: of the draw.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, vocabulary: int, seed: int
    ) -> None:
        super().__init__(rows)
        if tokenizer.mask_token_id is None:
            raise UsageError("the tokenizer has no mask token, which masked-lm hides tokens with")
        self.mask = cast(int, tokenizer.mask_token_id)
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.vocabulary, self.seed, self.epoch = vocabulary, seed, 0

    def cut(self, epoch: int) -> None:
        """Hide the tokens of an epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Row:
        row = dict(self.rows[index])
        ids = row["input_ids"]
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) % 2**63)
        chance, kind = torch.rand(2, len(ids), generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        plain = ~torch.isin(ids, self.special)
        # A short window may have none below the share: the token with the least is hidden in any case.
        least = chance.masked_fill(~plain, 2).min()
        hidden = plain & ((chance < HIDDEN_SHARE) | (chance == least))
        row["labels"] = ids.masked_fill(~hidden, IGNORED)
        changed = torch.where(kind < 0.8, self.mask, torch.where(kind < 0.9, others, ids))
        row["input_ids"] = torch.where(hidden, changed, ids)
        return row


def task_rows(
    data: str | Path,
    model: TaskModel,
    processor: Any,
    *,
    length: int,
    strict: bool = False,
    seed: int = 0,
) -> tuple[TaskRows, Skipped]:
    """The rows of a data file, a folder of pictures or a dataset of the hub.

    Args:
        processor: the model's tokenizer, image processor or both.
        length: tokens of a row at most; of masked-lm, of a window.
        strict: records with nothing in them are errors; else they are left out and counted.

    Raises:
        UsageError: the data cannot be used; names the file and the record.
    """
    if model.task.name == MASKED_LM:
        windows, skipped = _windows(data, processor, model.vocabulary, length, strict)
        return HiddenRows(windows, processor, model.vocabulary, seed), skipped
    kept, skipped = keep(_encoded(data, model, processor, length), strict=strict)
    rows = needed(str(data), kept, skipped)
    for entry in model.inputs:
        if entry.below is not None and entry.name in rows[0]:
            check_vocabulary(torch.cat([row[entry.name].flatten() for row in rows]), entry.below, data)
    return TaskRows(rows), skipped


def _windows(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, strict: bool
) -> tuple[list[Row], Skipped]:
    tokens, skipped = token_stream(tokenizer, read_samples(data, strict=strict), strict=strict)
    if len(tokens) < 2:
        raise UsageError(f"{data}: has fewer than two tokens")
    check_vocabulary(tokens, vocabulary, data)
    windows = [window for window in tokens.split(length) if len(window) == length or len(tokens) < length]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows], skipped


def _encoded(data: str | Path, model: TaskModel, processor: Any, length: int) -> Iterator[Row | Skip]:
    for record, where in read_records(data):
        try:
            row = model.task.encode(record, processor, model, length)
        except UsageError as error:
            raise UsageError(
                f"{where}: {error}; a record for {model.task.name} is {model.task.records}"
            ) from error
        yield Skip(where, row) if isinstance(row, str) else row


def fixed_names(model: TaskModel) -> frozenset[str]:
    """The names in rows of what has no tokens of its own: pictures, recordings of one size, labels of the whole row."""

    def varies(axes: Sequence[str | int]) -> bool:
        return any(axis in (LENGTH, TARGET, FRAMES) for axis in axes)

    fixed = {entry.name for entry in model.inputs if not varies(entry.axes)}
    per_token = all(varies(axes) for axes in model.task.outputs.values()) and len(model.task.outputs) == 1
    return frozenset(fixed if per_token else {*fixed, "labels"})


@dataclass(frozen=True)
class Scored:
    """How right a model's answers are.

    Attributes:
        loss: the task's, the mean over all labels; None where there are no labels.
        metrics: by name; those that the task has.
    """

    rows: int
    loss: float | None
    metrics: dict[str, float]

    @property
    def perplexity(self) -> float | None:
        """Of the labels, where they are tokens."""
        return self.metrics.get("perplexity")


@torch.no_grad()
def score_writing(
    model: EagerModel,
    rows: TaskRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    batch_size: int = 8,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """How near the texts that a model writes are to those of the rows: the task's `text_metrics`.

    Args:
        length: tokens that it writes at most.
        tick: called with the number of rows done.
    """
    written: list[str] = []
    wanted: list[str] = []
    pad_id, fixed = pad_token(tokenizer, model.vocabulary), fixed_names(model)
    for start in range(0, len(rows), batch_size):
        part = [rows[n] for n in range(start, min(start + batch_size, len(rows)))]
        tokens = model.write(pad(part, pad_id, fixed=fixed), length)
        written += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        wanted += tokenizer.batch_decode([row["labels"].tolist() for row in part], skip_special_tokens=True)
        tick(len(part))
    return model.task.text_metrics(written, wanted)


Answer = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def _outputs(task: Task, answer: Answer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    made = answer(batch)
    return {name: made[name].cpu() for name in task.outputs}


@torch.no_grad()
def score(
    model: TaskModel,
    rows: TaskRows,
    answer: Answer,
    pad_id: int,
    *,
    reference: Answer | None = None,
    batch_size: int = 8,
    least: int = 0,
    tick: Callable[[int], None] = lambda n: None,
) -> Scored:
    """The task's loss and metrics over some rows; of rows without labels, how near the outputs are to another model's.

    Args:
        model: for its task, configuration and loss.
        answer: the model: a batch of named inputs to its outputs by name.
        reference: the other model.
        least: tokens that a batch has at least.
        tick: called with the number of rows done.

    Raises:
        UsageError: there are no labels, and no other model.
    """
    task, fixed = model.task, fixed_names(model)
    total, count = 0.0, 0
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows), batch_size):
        batch = pad([rows[n] for n in range(start, min(start + batch_size, len(rows)))], pad_id, least, fixed)
        labels = batch.pop("labels", None)
        outputs = _outputs(task, answer, batch)
        if labels is None:
            if reference is None:
                raise UsageError(
                    f"{task.name}: there are no labels; name a model to compare with (--teacher)"
                )
            size = len(next(iter(batch.values())))
            total += float(task.distance(outputs, _outputs(task, reference, batch), batch)) * size
            count += size
            tick(size)
            continue
        answers, wanted = task.predict(outputs, labels)
        items = wanted.numel()
        if items == 0:
            continue
        total += float(task.loss(model, outputs, labels, num_items_in_batch=1))
        count += items
        found.append((answers, wanted))
        tick(len(labels))
    if count and not found:
        return Scored(len(rows), None, {"similarity": 1 - total / count})
    if not count:
        raise UsageError(f"{task.name}: no row has a label")
    predicted, wanted = (torch.cat(each) for each in zip(*found, strict=True))
    loss = total / count
    perplexity = {"perplexity": exp(min(loss, 700))} if task.predicts_tokens else {}
    return Scored(len(rows), loss, perplexity | task.metrics(predicted, wanted))
