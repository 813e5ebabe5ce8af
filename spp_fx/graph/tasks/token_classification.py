"""token-classification: a class for every token."""

from collections.abc import Mapping
from typing import ClassVar

from transformers.modeling_outputs import TokenClassifierOutput

from spp_fx.graph.task import BATCH, LENGTH, Task, register


@register("token-classification")
class TokenClassification(Task):
    """Labels are (batch, length): the class of a token, -100 where it has none."""

    auto: ClassVar[str] = "AutoModelForTokenClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",)
    answer: ClassVar = TokenClassifierOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
    peft: ClassVar[str | None] = "TOKEN_CLS"
