"""feature-extraction: the hidden states of an encoder, such as one for sentence embeddings."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from spp_fx.errors import UsageError
from spp_fx.graph.labels import text_row, texts_of, value_of
from spp_fx.graph.media import read_image
from spp_fx.graph.task import BATCH, Input, Row, Task, TaskModel, pixel_inputs, register, text_inputs


@register("feature-extraction")
class FeatureExtraction(Task):
    """There are no labels: such a model is trained to give another model's embeddings."""

    auto: ClassVar[str] = "AutoModel"
    tables: ClassVar[tuple[str, ...]] = ("MODEL_MAPPING_NAMES",)
    records: ClassVar[str] = "a text, or the path of an image"
    output_class: ClassVar = BaseModelOutput
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

    def loss(self, model: TaskModel, outputs: Mapping[str, Tensor], labels: Tensor, **kwargs: Any) -> Tensor:
        raise UsageError("feature-extraction has no labels: train it with --teacher")

    def encode(self, record: Mapping[str, Any], processor: Any, model: TaskModel, length: int) -> Row | str:
        if model.inputs[0].name == "pixel_values":
            image = read_image(value_of(record, ("image", "path", "file"), "image"))
            return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}
        text, _ = texts_of(record)
        if not text.strip():
            return "text is empty"
        return text_row(model, processor(text, truncation=True, max_length=length, verbose=False))

    def distance(
        self,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """1 - the cosine of the embeddings, the mean over the rows."""
        mask = batch.get("attention_mask")
        mine, other = (embeddings(side["last_hidden_state"], mask) for side in (ours, theirs))
        return (1 - cosine_similarity(mine, other)).mean()


def embeddings(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """An embedding of each row, (batch, width) float32: the mean of its hidden states.

    Args:
        hidden: (batch, tokens, width), or of an image (batch, width, height, width).
        mask: (batch, tokens), not zero where there is a token; None: everywhere.
    """
    states = hidden.float()
    if states.ndim == 4:
        return states.mean((2, 3))
    if mask is None:
        return states.mean(1)
    seen = mask.to(states)[..., None]
    return (states * seen).sum(1) / seen.sum(1).clamp(min=1)
