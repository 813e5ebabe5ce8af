"""sequence-classification: a class, several classes or a number for a text, or a pair of texts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from spp_fx.graph.labels import class_label, class_metrics, classified, text_row, texts_of, value_of
from spp_fx.graph.task import BATCH, Row, Task, TaskModel, classification_loss, register


@register("sequence-classification")
class SequenceClassification(Task):
    """Labels are as `classification_loss` has them."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",)
    records: ClassVar[str] = (
        "a text, or two (sentence1 and sentence2, ...), and label: a class, several, or a number"
    )
    output_class: ClassVar = SequenceClassifierOutput
    has_classes: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH,)}
    peft: ClassVar[str | None] = "SEQ_CLS"

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        return classification_loss(model.config, outputs["logits"], labels, **kwargs)

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        texts = texts_of(record)
        if not any((text or "").strip() for text in texts):
            return "text is empty"
        label = class_label(model.config, value_of(record, ("label", "labels"), "label"))
        tokens = processor(*texts, truncation=True, max_length=length, verbose=False)
        return text_row(model, tokens) | {"labels": label}

    def predict(self, outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        return classified(outputs, labels)

    def metrics(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        return class_metrics(predicted, wanted)
