"""seq2seq-lm: a decoder writes a text about the one that an encoder has read."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from spp_fx.graph.task import BATCH, TARGET, Input, Task, decoder_input, register, text_inputs


@register("seq2seq-lm")
class Seq2SeqLM(Task):
    """Labels are (batch, target): the token that each of the decoder's inputs should be followed by, or -100."""

    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",)
    answer: ClassVar = Seq2SeqLMOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, TARGET)}
    cached: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*text_inputs(model), decoder_input(model))
