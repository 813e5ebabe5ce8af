"""image-classification: a class for an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from spp_fx.graph.labels import class_label, class_metrics, classified, value_of
from spp_fx.graph.media import read_image
from spp_fx.graph.task import BATCH, Input, Row, Task, TaskModel, classification_loss, pixel_inputs, register


@register("image-classification")
class ImageClassification(Task):
    """Labels are as `classification_loss` has them."""

    auto: ClassVar[str] = "AutoModelForImageClassification"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",)
    records: ClassVar[str] = "image, the path of a picture, and label; or a folder of folders, one a class"
    output_class: ClassVar = ImageClassifierOutput
    has_classes: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH,)}

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return pixel_inputs(model)

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        return classification_loss(model.config, outputs["logits"], labels, **kwargs)

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        image = read_image(value_of(record, ("image", "path", "file"), "image"))
        label = class_label(model.config, value_of(record, ("label", "labels"), "label"))
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": label}

    def predict(self, outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        return classified(outputs, labels)

    def metrics(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        return class_metrics(predicted, wanted)
