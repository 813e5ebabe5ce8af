"""Small sparse models and their exports, for loading them back."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from spp_fx.verbs.export import export
from tests.families import make_model, prune_2_4

TRANSPOSED = ("c_attn", "c_proj", "c_fc")


SMALL = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **SMALL, intermediate_size=256, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False
    ),
    "llama-tied": lambda: LlamaConfig(
        **SMALL | {"vocab_size": 128}, intermediate_size=256, tie_word_embeddings=True
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=96, n_embd=128, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: MixtralConfig(
        **SMALL, intermediate_size=256, num_key_value_heads=2, num_local_experts=2
    ),
}
"""Families whose projections are large enough for every library."""


def wide_model(family: str = "llama", dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(WIDE[family](), dtype=dtype).eval()


def save_sparse(folder: Path, model: str | PreTrainedModel, also: tuple[str, ...] = ()) -> Path:
    """The folder of a model (or of a family) whose decoder matrices, and others by name, are 2:4."""
    model = make_model(model) if isinstance(model, str) else model
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and any(word in name for word in ("layers.", "h.", *also)):
            prune_2_4(weight, transposed=any(word in name for word in TRANSPOSED))
    model.save_pretrained(folder)
    return folder


def exported(model: Path, format: str, **options: object) -> Path:
    out = model.parent / f"{model.name}-{format}"
    export(model, out, format, **options)
    return out


def logits(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids.to(model.device)).logits.cpu()


def reference(folder: Path) -> PreTrainedModel:
    """What transformers makes of a plain model folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
