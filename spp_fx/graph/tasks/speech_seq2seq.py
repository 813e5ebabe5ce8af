"""speech-seq2seq: a decoder writes what is said in a recording."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from spp_fx.graph.labels import target_row, value_of
from spp_fx.graph.media import read_sound
from spp_fx.graph.task import (
    BATCH,
    TARGET,
    Input,
    Row,
    Task,
    TaskModel,
    decoder_input,
    register,
    sound_inputs,
)


@register("speech-seq2seq")
class SpeechSeq2Seq(Task):
    """Labels are (batch, target): the token that each of the decoder's inputs should be followed by, or -100."""

    auto: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",)
    records: ClassVar[str] = "audio, the path of a recording, and text, what is said"
    output_class: ClassVar = Seq2SeqLMOutput
    predicts_tokens: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, TARGET)}
    cached: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*sound_inputs(model), decoder_input(model))

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        text = value_of(record, ("text", "sentence", "transcription"), "text")
        if not str(text).strip():
            return "text is empty"
        rate = processor.feature_extractor.sampling_rate
        sound = read_sound(value_of(record, ("audio", "path", "file"), "recording"), rate)
        longest = getattr(processor.feature_extractor, "n_samples", None)
        if longest is not None and len(sound) > longest:
            return f"is longer than {longest / rate:g} s, which the model takes at most"
        given = processor.feature_extractor(
            sound, sampling_rate=rate, return_tensors="pt", return_attention_mask=True
        )
        names = {entry.name for entry in model.inputs}
        row = {name: value[0] for name, value in given.items() if name in names}
        tokens = processor.tokenizer(str(text), truncation=True, max_length=length, verbose=False)[
            "input_ids"
        ]
        # Some tokenizers begin with the token that the decoder is started with.
        start = model.config.decoder_start_token_id
        return row | target_row(model, tokens[1:] if tokens[:1] == [start] else tokens)

    def text_metrics(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Word error rate of all texts together: wrong, missing and added words by the words that are said.

        Upper and lower case are different words, and so are words with and without a comma behind them.
        """
        from torchmetrics.functional.text import word_error_rate  # its import takes a second

        return {"word_error_rate": float(word_error_rate(list(written), list(wanted)))}
