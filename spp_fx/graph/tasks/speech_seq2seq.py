"""speech-seq2seq: a decoder writes what is said in a recording."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from spp_fx.graph.task import BATCH, TARGET, Input, Task, decoder_input, register, sound_inputs


@register("speech-seq2seq")
class SpeechSeq2Seq(Task):
    """Labels are (batch, target): the token that each of the decoder's inputs should be followed by, or -100."""

    auto: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",)
    answer: ClassVar = Seq2SeqLMOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, TARGET)}
    cached: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*sound_inputs(model), decoder_input(model))
