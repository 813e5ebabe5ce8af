"""question-answering: the first and the last token of the answer in a text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from spp_fx.graph.task import BATCH, LENGTH, Task, cross_entropy, register

if TYPE_CHECKING:
    from spp_fx.graph.program import Program


@register("question-answering")
class QuestionAnswering(Task):
    """Labels are (batch, 2): the positions of the first and the last token; -100 where they are unknown."""

    auto: ClassVar[str] = "AutoModelForQuestionAnswering"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",)
    answer: ClassVar = QuestionAnsweringModelOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "start_logits": (BATCH, LENGTH),
        "end_logits": (BATCH, LENGTH),
    }
    peft: ClassVar[str | None] = "QUESTION_ANS"

    def loss(
        self, program: "Program", outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any
    ) -> Tensor:
        both = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)  # (batch, 2, length)
        return cross_entropy(both, labels, **kwargs)
