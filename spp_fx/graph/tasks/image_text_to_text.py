"""image-text-to-text: a language model that also sees images."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from spp_fx.graph.task import BATCH, LENGTH, Input, Task, pixel_inputs, register, text_inputs

if TYPE_CHECKING:
    from spp_fx.graph.program import Program


@register("image-text-to-text")
class ImageTextToText(Task):
    """As causal-lm, with images in the place of some tokens."""

    auto: ClassVar[str] = "AutoModelForImageTextToText"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",)
    answer: ClassVar = CausalLMOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
    cached: ClassVar[bool] = True

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*text_inputs(model), *pixel_inputs(model))

    def loss(
        self, program: "Program", outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any
    ) -> Tensor:
        assert program.loss_function is not None
        return program.loss_function(
            logits=outputs["logits"], labels=labels, vocab_size=program.vocabulary, **kwargs
        )
