"""masked-lm: hidden tokens are predicted from all others."""

from collections.abc import Mapping
from typing import ClassVar

from transformers.modeling_outputs import MaskedLMOutput

from spp_fx.graph.task import BATCH, LENGTH, Task, register


@register("masked-lm")
class MaskedLM(Task):
    """Labels are (batch, length): the token where it is hidden, -100 elsewhere."""

    auto: ClassVar[str] = "AutoModelForMaskedLM"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",)
    output_class: ClassVar = MaskedLMOutput
    predicts_tokens: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
