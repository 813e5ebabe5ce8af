"""causal-lm: each token predicts the next."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from spp_fx.graph.task import (
    BATCH,
    CAUSAL_LM,
    LENGTH,
    Input,
    Task,
    TaskModel,
    classes,
    model_types,
    next_token_loss,
    register,
    text_inputs,
)

SEEING_OR_HEARING = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
"""Tables with language models beside others."""


@register("causal-lm")
class CausalLM(Task):
    """Labels are the tokens themselves, and the loss is the model family's own."""

    name: ClassVar[str] = CAUSAL_LM
    auto: ClassVar[str] = "AutoModelForCausalLM"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)
    output_class: ClassVar = CausalLMOutput
    predicts_tokens: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
    cached: ClassVar[bool] = True
    peft: ClassVar[str | None] = "CAUSAL_LM"

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return text_inputs(model)

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        return next_token_loss(model, outputs["logits"], labels, **kwargs)

    def claims(self, architecture: str, config: PretrainedConfig) -> bool:
        """Those that also see or hear are language models unless another task is asked for."""
        if super().claims(architecture, config):
            return True
        if config.is_encoder_decoder:
            return False
        if architecture in classes(*SEEING_OR_HEARING):
            return True
        # Its head may be the embedding; loading reports one that is missing. BERT's is a head of its own.
        causal, masked = (model_types(t) for t in (self.tables[0], "MODEL_FOR_MASKED_LM_MAPPING_NAMES"))
        return architecture in classes("MODEL_MAPPING_NAMES") and config.model_type in causal - masked

    def takes(self, model: PreTrainedModel) -> bool:
        if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
            return False
        # BertForMaskedLM has a head as well, and looks ahead.
        known = super().takes(model) or not type(model).__module__.startswith("transformers.")
        return known or bool(model.can_generate())
