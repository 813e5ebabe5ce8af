"""sequence-classification: a class, several classes or a number for a text, or a pair of texts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from spp_fx.graph.task import BATCH, Task, classification_loss, register

if TYPE_CHECKING:
    from spp_fx.graph.program import Program


@register("sequence-classification")
class SequenceClassification(Task):
    """Labels are as `classification_loss` has them."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",)
    answer: ClassVar = SequenceClassifierOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH,)}
    peft: ClassVar[str | None] = "SEQ_CLS"

    def loss(
        self, program: "Program", outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any
    ) -> Tensor:
        return classification_loss(program.config, outputs["logits"], labels, **kwargs)
