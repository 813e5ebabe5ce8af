"""Which tensors of a file without a model around it are weights of linears, as far as names and shapes tell."""

import re
from collections.abc import Iterable

_SPARE = ("bias", "blocks", "scale", "scales", "inv", "zeros")
"""Last words of what lies beside a stack of experts and is none."""


def is_site(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a matrix, or a stack of them, that pruning would look at.

    Embeddings, norms and the head are none. Stacks of experts are parameters of their own in many models
    and need not be called a weight; a convolution has three dimensions and is no stack.
    """
    words = list(_words(name))
    if any(_is_spared(word) for word in words) or "lm_head" in name.split("."):
        return False
    if len(shape) == 3:
        return words[-1] not in _SPARE and not any(re.fullmatch(r"conv[123]?d?", word) for word in words)
    return len(shape) == 2 and name.endswith("weight")


def _words(name: str) -> Iterable[str]:
    """`layers.0.input_layernorm.weight` -> layers, 0, input, layernorm, weight."""
    return re.split(r"[._]", name)


def _is_spared(word: str) -> bool:
    return word in ("wte", "wpe") or word.startswith("embed") or word.rstrip("0123456789").endswith("norm")
