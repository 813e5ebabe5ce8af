"""Holding config.json to its weights before a model is made of it: one with 10 million layers is never done."""

from typing import Any

from spp_fx.checkpoint import ModelFolder
from spp_fx.errors import FormatError

_COUNTS = frozenset(
    (
        "decoder_layers",
        "encoder_layers",
        "n_layer",
        "n_layers",
        "num_decoder_layers",
        "num_hidden_layers",
        "num_layers",
    )
)
"""What configurations call the number of layers, in the file and in the tables nested in it."""


def check_layer_count(folder: ModelFolder, stored: int) -> None:
    """FormatError if config.json speaks of more layers than there are stored tensors, of which each has several."""
    tables: list[dict[str, Any]] = [folder.config]
    while tables:
        for key, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
            elif key in _COUNTS and isinstance(value, int | float) and value > stored:
                raise FormatError(
                    f"{folder.path / 'config.json'}: {key} is {value:.15g}, and only {stored} tensors are stored; "
                    "it is damaged, or not that of these weights"
                )
