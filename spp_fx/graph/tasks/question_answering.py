"""question-answering: the first and the last token of the answer in a text."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from spp_fx.errors import UsageError
from spp_fx.graph.labels import text_row, value_of
from spp_fx.graph.task import BATCH, LENGTH, Row, Task, TaskModel, cross_entropy, register


@register("question-answering")
class QuestionAnswering(Task):
    """Labels are (batch, 2): the positions of the first and the last token; -100 where they are unknown."""

    auto: ClassVar[str] = "AutoModelForQuestionAnswering"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",)
    records: ClassVar[str] = "question, context and answers with text and answer_start, as in SQuAD"
    output_class: ClassVar = QuestionAnsweringModelOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "start_logits": (BATCH, LENGTH),
        "end_logits": (BATCH, LENGTH),
    }
    peft: ClassVar[str | None] = "QUESTION_ANS"

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        both = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)  # (batch, 2, length)
        return cross_entropy(both, labels, **kwargs)

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        question, context = (value_of(record, (key,), key) for key in ("question", "context"))
        answers = value_of(record, ("answers", "answer"), "answers")
        if not isinstance(question, str) or not isinstance(context, str) or not isinstance(answers, dict):
            raise UsageError(
                "needs question and context that are text, and answers with text and answer_start"
            )
        begins, texts = (answers.get(key, ()) for key in ("answer_start", "text"))
        if not texts or not texts[0]:
            return "has no answer"
        if len(begins) != len(texts):
            raise UsageError("answers needs an answer_start for each text")
        begin = int(begins[0])
        end = begin + len(texts[0])
        tokens = processor(
            question, context, truncation="only_second", max_length=length, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        inside = [
            at
            for at, (span, text) in enumerate(
                zip(tokens["offset_mapping"], tokens.sequence_ids(), strict=True)
            )
            if text == 1 and span[0] < end and span[1] > begin
        ]
        if not inside or tokens["offset_mapping"][inside[-1]][1] < end:
            return f"its answer is not within {length} tokens; raise --seq-len"
        return text_row(model, tokens) | {"labels": torch.tensor([inside[0], inside[-1]])}

    def predict(self, outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        spans = torch.stack([outputs[name].argmax(-1) for name in self.outputs], dim=-1)
        return spans, labels

    def metrics(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        """Exact matches, and the mean F1 of the tokens of the predicted and the true answer."""
        (ours, our_end), (theirs, their_end) = predicted.unbind(-1), wanted.unbind(-1)
        overlap = (torch.minimum(our_end, their_end) - torch.maximum(ours, theirs) + 1).clamp(min=0)
        sizes = (our_end - ours + 1).clamp(min=0) + (their_end - theirs + 1)
        exact = (predicted == wanted).all(-1)
        return {
            "exact_match": float(exact.double().mean()),
            "f1": float((2 * overlap / sizes).double().mean()),
        }
