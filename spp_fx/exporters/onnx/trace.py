"""The two signatures that a causal language model is exported to ONNX with: plain, and with a key/value cache.

Names and axes are those that Optimum gives its exports, so that what runs those runs these. Where a model's
layers look back over a window only, the cache keeps everything and the mask does the windowing: it computes
the same, and every layer's inputs have one form.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.graph.trace import export_as

BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "past_sequence_length + sequence_length",
)
Axes = Mapping[int, str]


@dataclass(frozen=True)
class Signature:
    """A model exported by torch, and what its inputs and outputs are called.

    Attributes:
        program: the exported program.
        args: the example that it was exported with, for torch.onnx.
        inputs: the dynamic axes of each input by its name, in order.
        outputs: the same of each output.
    """

    program: ExportedProgram
    args: tuple[Any, ...]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]


@dataclass(frozen=True)
class CacheLayer:
    """Heads and width of the keys and of the values that one layer caches."""

    keys: tuple[int, int]
    values: tuple[int, int]


def plain_signature(model: PreTrainedModel) -> Signature:
    """`(input_ids, attention_mask) -> logits`, all (batch, sequence, ...).

    Raises:
        SppFxError: the model cannot be traced.
    """
    call = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return call(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.ones(2, 8, dtype=torch.int64)  # no 0 or 1: torch.export would make those constants
    axes = {0: BATCH, 1: SEQUENCE}
    program = export_as(model, forward, (ids, torch.ones_like(ids)), (_dynamic(axes), _dynamic(axes)))
    return Signature(program, (ids, ids), {"input_ids": axes, "attention_mask": axes}, {"logits": axes})


def cached_signature(model: PreTrainedModel) -> Signature:
    """`(input_ids, attention_mask, position_ids, past) -> (logits, present)`.

    `past_key_values.N.key` and `.value` are (batch, heads, past, width), `present.N.*` the same with the new
    tokens behind; past may be 0 long. `attention_mask` covers past and new tokens, `position_ids` the new
    ones (a model that takes none, because it counts by the mask or needs no positions, has no such input).

    Raises:
        SppFxError: the model cannot be traced, or caches something else than keys and values.
    """
    call = model.forward
    cached = cache_layers(model)
    counted = takes_positions(model)

    def run(
        input_ids: Tensor, attention_mask: Tensor, past: list[list[Tensor]], **positions: Tensor
    ) -> list[Tensor]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        out = call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        layers: Any = cache.layers
        return [out.logits, *(side for layer in layers for side in (layer.keys, layer.values))]

    def with_positions(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[list[Tensor]]
    ) -> list[Tensor]:
        return run(input_ids, attention_mask, past, position_ids=position_ids)

    batch, length, before = 2, 8, 5
    ids = torch.ones(batch, length, dtype=torch.int64)
    mask = torch.ones(batch, before + length, dtype=torch.int64)
    past = [
        [
            torch.zeros(batch, heads, before, width, dtype=model.dtype)
            for heads, width in (one.keys, one.values)
        ]
        for one in cached
    ]
    axes, whole = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 1: TOTAL}
    old, new = {0: BATCH, 2: PAST}, {0: BATCH, 2: TOTAL}
    inputs: dict[str, Axes] = {"input_ids": axes, "attention_mask": whole}
    args: list[Any] = [ids, mask]
    if counted:
        inputs["position_ids"] = axes
        args.append(torch.arange(before, before + length).repeat(batch, 1))
    dynamic: list[Any] = [_dynamic(each) for each in inputs.values()]
    outputs: dict[str, Axes] = {"logits": axes}
    for layer in range(len(cached)):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = old
            outputs[f"present.{layer}.{side}"] = new
    args.append(past)
    dynamic.append([[_dynamic(old), _dynamic(old)] for _ in cached])
    program = export_as(model, with_positions if counted else run, tuple(args), tuple(dynamic))
    return Signature(program, tuple(args), inputs, outputs)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model is told where its tokens stand; others count, or need not know."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def cache_layers(model: PreTrainedModel) -> list[CacheLayer]:
    """What each layer of a model caches, seen in a traced call.

    Raises:
        SppFxError: a layer caches something else than keys and values, such as a state of fixed size.
    """
    call = model.forward
    kinds: list[str] = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        out = call(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        layers = getattr(cache, "layers", [])
        kinds[:] = [type(layer).__name__ for layer in layers]
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
        found = [side for pair in pairs for side in pair if isinstance(side, Tensor) and side.ndim == 4]
        whole = bool(layers) and len(found) == 2 * len(layers)
        return found if whole else [out.logits]

    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: BATCH, 1: SEQUENCE}
    program = export_as(model, forward, (ids, torch.ones_like(ids)), (_dynamic(axes), _dynamic(axes)))
    known = {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if not kinds or set(kinds) - known:
        what = ", ".join(sorted(set(kinds) - known)) or "no list of layers"
        raise SppFxError(
            f"{type(model).__name__} keeps {what} while it generates, not keys and values alone: its cache has "
            "no form under Optimum's names; export it without --with-past"
        )
    outputs = program.graph_module.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    shapes = [tuple(node.meta["val"].shape) for node in outputs]  # type: ignore[union-attr]
    sizes = [(int(shape[1]), int(shape[3])) for shape in shapes]
    return [CacheLayer(*pair) for pair in zip(sizes[0::2], sizes[1::2], strict=True)]


def _dynamic(axes: Axes) -> dict[int, Any]:
    return dict.fromkeys(axes, Dim.DYNAMIC)
