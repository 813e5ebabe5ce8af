"""seq2seq-lm: a decoder writes a text about the one that an encoder has read."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from spp_fx.errors import UsageError
from spp_fx.graph.labels import target_row, text_row, value_of
from spp_fx.graph.task import BATCH, TARGET, Input, Row, Task, TaskModel, decoder_input, register, text_inputs

SOURCES = ("source", "instruction", "text", "document", "article", "dialogue", "input", "prompt", "question")
TARGETS = ("target", "summary", "highlights", "output", "completion", "response", "answer")


@register("seq2seq-lm")
class Seq2SeqLM(Task):
    """Labels are (batch, target): the token that each of the decoder's inputs should be followed by, or -100."""

    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",)
    records: ClassVar[str] = (
        "source (text, document, ...) and target (summary, ...), or translation, two texts"
    )
    output_class: ClassVar = Seq2SeqLMOutput
    predicts_tokens: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, TARGET)}
    cached: ClassVar[bool] = True
    peft: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def claims(self, architecture: str, config: PretrainedConfig) -> bool:
        """Not the language models with an encoder for sounds, which are in transformers' table as well."""
        return config.is_encoder_decoder and super().claims(architecture, config)

    def takes(self, model: PreTrainedModel) -> bool:
        return model.config.is_encoder_decoder and super().takes(model)

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*text_inputs(model), decoder_input(model))

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        if isinstance(pair := record.get("translation"), dict) and len(pair) == 2:
            source, target = pair.values()
        else:
            source, target = value_of(record, SOURCES, "source"), value_of(record, TARGETS, "target")
            if "instruction" in record and record.get("input"):
                source = f"{source}\n\n{record['input']}"
        if not isinstance(source, str) or not isinstance(target, str):
            raise UsageError("needs a source and a target that are text")
        if not source.strip() or not target.strip():
            return "source or target is empty"
        tokens = processor(source, truncation=True, max_length=length, verbose=False)
        wanted = processor(text_target=target, truncation=True, max_length=length, verbose=False)["input_ids"]
        return text_row(model, tokens) | target_row(model, wanted)

    def text_metrics(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """BLEU of all texts together, 0 to 1, of sacreBLEU's tokens `13a` (Post, 2018)."""
        from torchmetrics.functional.text import sacre_bleu_score  # its import takes a second

        return {"bleu": float(sacre_bleu_score(written, [[text] for text in wanted]))}
