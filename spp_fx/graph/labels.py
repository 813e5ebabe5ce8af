"""What records hold, texts and labels, under the names that public data sets have; scores of predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from spp_fx.errors import UsageError
from spp_fx.graph.task import Row, TaskModel


def value_of(record: Mapping[str, Any], keys: Sequence[str], what: str) -> Any:
    """The value of the first of some keys that a record has; UsageError if it has none."""
    for key in keys:
        if record.get(key) is not None:
            return record[key]
    found = ", ".join(map(str, record)) or "none"
    raise UsageError(f"has no {what} ({', '.join(keys)}); it has: {found}")


TEXTS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair"),
    ("question", "sentence"), ("sentence", None), ("text", None),
)  # fmt: skip
"""Names of a text, or of a pair of texts, in public data sets; the first of which a record has all count."""


def texts_of(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of a record, or its two texts.

    Raises:
        UsageError: it has none, or one that is not text.
    """
    for first, second in TEXTS:
        if isinstance(record.get(first), str) and (second is None or isinstance(record.get(second), str)):
            return record[first], None if second is None else record[second]
    known = "; ".join(first if second is None else f"{first} and {second}" for first, second in TEXTS)
    raise UsageError(f"has no text ({known}); it has: {', '.join(map(str, record)) or 'none'}")


def text_row(model: TaskModel, tokens: Mapping[str, Any]) -> Row:
    """The program's inputs among what a tokenizer gives for one text."""
    names = {entry.name for entry in model.inputs}
    return {name: torch.tensor(value) for name, value in tokens.items() if name in names}


def class_number(config: PretrainedConfig, label: Any) -> int:
    """The number of a class that is given by its number or its name.

    Raises:
        UsageError: the model has no such class.
    """
    classes: Mapping[Any, Any] = config.label2id or {}
    if isinstance(label, str) and label in classes:
        return int(classes[label])
    if isinstance(label, bool | int) and 0 <= int(label) < len(classes):
        return int(label)
    names = ", ".join(list(map(str, classes))[:6])
    raise UsageError(f"has the label {label!r}, and the model has {len(classes)} classes ({names})")


def class_label(config: PretrainedConfig, label: Any) -> Tensor:
    """A label as `classification_loss` takes it, of a record's number, name or list of them."""
    if config.problem_type == "regression" or config.num_labels == 1:
        if not isinstance(label, int | float):
            raise UsageError(f"has the label {label!r}, and the model predicts a number")
        return torch.tensor(float(label))
    if isinstance(label, list):
        applies = torch.zeros(len(config.label2id or {}))
        applies[[class_number(config, each) for each in label]] = 1
        return applies
    number = class_number(config, label)
    if config.problem_type == "multi_label_classification":
        return torch.nn.functional.one_hot(torch.tensor(number), len(config.label2id or {})).float()
    return torch.tensor(number)


def classified(outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """`Task.predict` of logits (batch, classes): classes, numbers where there is one logit, or 0 and 1 for each."""
    logits = outputs["logits"]
    if logits.shape[-1] == 1:
        return logits.squeeze(-1).float(), labels.float()
    if labels.ndim > 1:
        return (logits > 0).long().flatten(), labels.long().flatten()
    return logits.argmax(-1), labels


def class_metrics(predicted: Tensor, wanted: Tensor) -> dict[str, float]:
    """Accuracy and the mean F1 over the classes; of numbers, Spearman's correlation and the mean square error."""
    # Their import takes a second.
    from torchmetrics.functional import spearman_corrcoef
    from torchmetrics.functional.classification import multiclass_f1_score

    if predicted.is_floating_point():
        error = float((predicted - wanted).double().square().mean())
        return {"spearman": float(spearman_corrcoef(predicted, wanted)), "mean_square_error": error}
    classes = 1 + int(torch.cat([predicted, wanted]).max())
    f1 = multiclass_f1_score(predicted, wanted, num_classes=max(classes, 2), average="macro")
    return {"accuracy": float((predicted == wanted).double().mean()), "f1": float(f1)}


def target_row(model: TaskModel, target: Sequence[int]) -> Row:
    """Labels of a decoder, and its inputs: what it should write, one token later.

    Raises:
        UsageError: config.json has no token to start with.
    """
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config.get_text_config(decoder=True), "bos_token_id", None) if start is None else start
    if start is None:
        raise UsageError(
            "the model has no decoder_start_token_id (config.json), which its decoder begins with"
        )
    return {
        "labels": torch.tensor(list(target), dtype=torch.int64),
        "decoder_input_ids": torch.tensor([start, *target[:-1]], dtype=torch.int64),
    }
