"""image-text-to-text: a language model that also sees images."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from spp_fx.errors import UsageError
from spp_fx.graph.labels import value_of
from spp_fx.graph.media import read_image
from spp_fx.graph.task import (
    BATCH,
    LENGTH,
    Input,
    Row,
    Task,
    TaskModel,
    next_token_loss,
    pixel_inputs,
    register,
    text_inputs,
)


@register("image-text-to-text")
class ImageTextToText(Task):
    """As causal-lm, with images in the place of some tokens."""

    auto: ClassVar[str] = "AutoModelForImageTextToText"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",)
    records: ClassVar[str] = "image, the path of a picture, and text with the image token where it stands"
    output_class: ClassVar = CausalLMOutput
    predicts_tokens: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, tuple[str, ...]]] = {"logits": (BATCH, LENGTH)}
    cached: ClassVar[bool] = True

    def inputs(self, model: PreTrainedModel) -> tuple[Input, ...]:
        return (*text_inputs(model), *pixel_inputs(model))

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        return next_token_loss(model, outputs["logits"], labels, **kwargs)

    def predict(self, outputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        return super().predict({"logits": outputs["logits"][:, :-1]}, labels[:, 1:])

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        image = read_image(value_of(record, ("image", "path", "file"), "image"))
        text = value_of(record, ("text", "caption"), "text")
        given = processor(images=image, text=text, return_tensors="pt", truncation=False)
        names = {entry.name for entry in model.inputs}
        row = {name: value[0] for name, value in given.items() if name in names}
        if not bool((row["input_ids"] == image_token(model.config)).any()):
            raise UsageError("has no image token in its text, where the picture stands")
        if row["input_ids"].numel() > length:
            return f"has {row['input_ids'].numel()} tokens with its image; raise --seq-len"
        special = torch.tensor([*processor.tokenizer.all_special_ids, image_token(model.config)])
        labels = row["input_ids"].masked_fill(torch.isin(row["input_ids"], special), -100)
        return row | {"labels": labels}


def image_token(config: PretrainedConfig) -> int:
    """The token that stands for a part of an image, -1 if the configuration names none."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if isinstance(token, int)), -1)
