"""image-classification: a class for an image."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from spp_fx.graph.task import BATCH, Input, Task, classification_loss, pixel_inputs, register

if TYPE_CHECKING:
    from spp_fx.graph.program import Program


@register("image-classification")
class ImageClassification(Task):
    """Labels are as `classification_loss` has them."""

    auto: ClassVar[str] = "AutoModelForImageClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",)
    answer: ClassVar = ImageClassifierOutput
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH,)}

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return pixel_inputs(model)

    def loss(
        self, program: "Program", outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any
    ) -> Tensor:
        return classification_loss(program.config, outputs["logits"], labels, **kwargs)
