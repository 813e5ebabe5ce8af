"""token-classification: a class for every token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from spp_fx.errors import UsageError
from spp_fx.graph.labels import class_metrics, class_number, text_row, value_of
from spp_fx.graph.task import BATCH, LENGTH, Row, Task, TaskModel, register


@register("token-classification")
class TokenClassification(Task):
    """Labels are (batch, length): the class of a token, -100 where it has none."""

    auto: ClassVar[str] = "AutoModelForTokenClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",)
    records: ClassVar[str] = "tokens, a list of words, and labels (ner_tags), their classes by number or name"
    output_class: ClassVar = TokenClassifierOutput
    has_classes: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
    peft: ClassVar[str | None] = "TOKEN_CLS"

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        words = value_of(record, ("tokens", "words"), "words")
        labels = value_of(record, ("labels", "ner_tags", "tags", "pos_tags"), "labels")
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
            raise UsageError("needs as many labels as words, in two lists")
        if not words:
            return "has no words"
        tokens = processor(words, is_split_into_words=True, truncation=True, max_length=length, verbose=False)
        owners: list[int | None] = tokens.word_ids()
        # The first token of a word has its class, the rest none.
        first = [owner if owner not in owners[:at] else None for at, owner in enumerate(owners)]
        numbers = [-100 if owner is None else class_number(model.config, labels[owner]) for owner in first]
        return text_row(model, tokens) | {"labels": torch.tensor(numbers)}

    def metrics(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        return class_metrics(predicted, wanted)
