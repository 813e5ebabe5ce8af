"""Random inputs of a model, of several sizes and padded on either side, for comparing what two sides make of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.graph.sizes import ANY_SIZES, LONGEST, Sizes
from spp_fx.graph.task import BATCH, FRAMES, LENGTH, TARGET, Input
from spp_fx.graph.tasks.image_text_to_text import image_token

Tensors = Mapping[str, Tensor]

_BATCHES = ((1, 1), (2, 7), (3, 16), (1, 33))


def draw_batches(
    entries: Sequence[Input],
    dtype: torch.dtype,
    *,
    batches: Sequence[tuple[int, int]] = _BATCHES,
    max_length: int | None = None,
    sizes: Sizes = ANY_SIZES,
    images: "ImageTokens | None" = None,
) -> Iterator[Tensors]:
    """A few random batches of different sizes, by the names of the inputs.

    In those of two rows and more, one text is padded on the left and one on the right (with random tokens, which the
    mask has to hide), and one recording on the right.

    Args:
        dtype: of inputs that are not integers.
        batches: (batch, sequence) pairs; tokens of images come on top.
        max_length: longest text the model takes; longer ones are cut.
        sizes: that the file takes; batches of others are left out, and the least that it takes stands for all.

    Raises:
        SppFxError: it takes none of a few thousand tokens.
    """
    generator = torch.Generator().manual_seed(0)
    images = images or ImageTokens(-1, 0)
    longest = LONGEST if max_length is None else max(1, max_length - images.count)
    wanted = [_axes(rows, min(length, longest)) for rows, length in batches]
    least = (_axes(rows, length) for rows in (2, 1) for length in range(1, longest + 1))

    def admitted(given: dict[str, int]) -> bool:
        return sizes.admit(**given | {LENGTH: given[LENGTH] + images.count})

    taken = [given for given in wanted if admitted(given)] or list(islice(filter(admitted, least), 1))
    if not taken:
        raise SppFxError(
            f"no text of up to {longest} tokens can be drawn that the graph takes ({sizes.described()})"
        )
    for given in taken:
        made = {entry.name: entry.drawn(given, dtype, generator) for entry in entries}
        short = given[LENGTH] // 3
        for entry in entries:
            if entry.name == "attention_mask" and given[BATCH] > 1:
                if LENGTH in entry.axes:
                    made[entry.name][0, :short] = 0
                    made[entry.name][1, given[LENGTH] - short :] = 0
                else:
                    made[entry.name][1, made[entry.name].shape[1] * 2 // 3 :] = 0
        yield images.inserted(made, {e.name: e for e in entries}, short) if images.count else made


def _axes(rows: int, length: int) -> dict[str, int]:
    """Sizes of all axes; a decoder has another number of tokens than its encoder, as far as there are two."""
    return {BATCH: rows, LENGTH: length, TARGET: length // 2 + 1, FRAMES: 400 + 40 * (length % 9)}


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of a text whose embeddings are those of an image.

    Attributes:
        token: their id.
        count: how many an image takes.
    """

    token: int
    count: int

    @classmethod
    def of(cls, model: PreTrainedModel, entries: Sequence[Input]) -> "ImageTokens | None":
        """Those of a model, which computes the features of one image; None where it has none."""
        pixels = next((entry for entry in entries if entry.name == "pixel_values"), None)
        token = image_token(model.config)
        own = (getattr(each, "get_image_features", None) for each in (model, model.base_model))
        features = next(filter(None, own), None)  # Janus has it below its head
        if pixels is None or token < 0 or features is None or len(entries) == 1:
            return None
        with torch.no_grad():
            made = features(pixel_values=pixels.filled({BATCH: 1}, model.dtype, torch.device("cpu")))
        made = getattr(made, "pooler_output", made)
        numel = made.numel() if isinstance(made, Tensor) else sum(each.numel() for each in made)
        return cls(token, numel // int(model.config.get_text_config().hidden_size))

    def inserted(self, inputs: Tensors, entries: Mapping[str, Input], at: int) -> dict[str, Tensor]:
        """Drawn inputs with the tokens of an image in each text, at a position, and nowhere else."""
        made = dict(inputs)
        for name, entry in entries.items():
            if entry.axes == (BATCH, LENGTH):
                value = made[name]
                fill = self.token if name == "input_ids" else entry.default or 0
                if name == "input_ids":
                    value = torch.where(value == self.token, (value + 1) % (entry.below or 2), value)
                middle = torch.full((len(value), self.count), fill, dtype=value.dtype)
                made[name] = torch.cat([value[:, :at], middle, value[:, at:]], dim=1)
        return made
