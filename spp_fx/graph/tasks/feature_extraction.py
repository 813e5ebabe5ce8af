"""feature-extraction: the hidden states of an encoder, such as one for sentence embeddings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from spp_fx.errors import UsageError
from spp_fx.graph.task import BATCH, Input, Task, pixel_inputs, register, text_inputs

if TYPE_CHECKING:
    from spp_fx.graph.program import Program


@register("feature-extraction")
class FeatureExtraction(Task):
    """There are no labels: such a model is trained to give another model's embeddings."""

    auto: ClassVar[str] = "AutoModel"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_MAPPING_NAMES",)
    answer: ClassVar = BaseModelOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"last_hidden_state": (BATCH,)}
    peft: ClassVar[str | None] = "FEATURE_EXTRACTION"

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        if model.main_input_name == "pixel_values":
            return pixel_inputs(model)
        if model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
            return text_inputs(model, segments=True)
        raise UsageError(
            f"{type(model).__name__} is not an encoder of text or images, so its features cannot be extracted"
        )

    def loss(
        self, program: "Program", outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any
    ) -> Tensor:
        raise UsageError("feature-extraction has no labels: train it with --teacher")
