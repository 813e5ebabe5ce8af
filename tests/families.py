"""Small random models of the families that differ in how their graphs spell a linear."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    FalconConfig,
    Gemma3Config,
    Gemma4Config,
    GotOcr2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.effort import nightly

VOCABULARY = 96
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "llama-tied": lambda: LlamaConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True, attention_dropout=0.1
    ),
    "qwen2": lambda: Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    ),
    "falcon": lambda: FalconConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4
    ),
    "gpt-oss": lambda: GptOssConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, head_dim=8
    ),
}
REQUIRED = ("llama", "gpt2", "falcon", "mixtral")
SPREAD = [family if family in REQUIRED else nightly(family) for family in FAMILIES]
"""Parameters of a test whose code the other families do not take another way through."""


_TEXT = SMALL | {
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
}
_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}

# Causal language models that see images, too: the sizes of their text stand in a configuration of its own.
MULTIMODAL: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=_TEXT,
        vision_config=_VISION | {"intermediate_size": 16, "image_size": 28},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    ),
    "gemma4": lambda: Gemma4Config(
        text_config=_TEXT
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
        vision_config=None,
        audio_config=None,
    ),
    "got_ocr2": lambda: GotOcr2Config(
        text_config=_TEXT | {"model_type": "qwen2"},
        vision_config=_VISION | {"output_channels": 8, "image_size": 56, "mlp_dim": 16},
    ),
}


def shallow(family: str) -> PretrainedConfig:
    """The configuration of a family with one layer, for tests that trace or export a model of their own."""
    config = FAMILIES[family]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def make_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, one_layer: bool = False
) -> PreTrainedModel:
    """A random model of a family, in eval mode, dense."""
    torch.manual_seed(seed)
    config = shallow(family) if one_layer else FAMILIES[family]()
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prune_2_4(weight: torch.Tensor, *, transposed: bool = False) -> None:
    """Zero the two smallest of every four entries along the input dimension, in place."""
    with torch.no_grad():
        canonical = weight.transpose(-1, -2) if transposed else weight
        groups = canonical.reshape(-1, 4)
        smallest = groups.abs().argsort(dim=1)[:, :2]
        pruned = groups.clone().scatter_(1, smallest, 0).reshape(canonical.shape)
        canonical.copy_(pruned)


def batch(rows: int = 2, columns: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, columns), generator=generator)


_TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
_TINY_SPEECH = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
          (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
_TINY_VISION = _TINY | {"image_size": 16, "patch_size": 8}
OTHER_TASKS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=96, **_TINY | {"num_hidden_layers": 2})),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2)
    ),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=96, d_model=16, num_mel_bins=8, max_source_positions=10, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, **_TINY_SPEECH,
        )
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_TINY_VISION | {"num_hidden_layers": 2})),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=96, **_TINY), image_token_index=95, image_seq_length=4,
            vision_feature_layer=-1,
            vision_config=CLIPVisionConfig(**_TINY_VISION, projection_dim=16),
        )
    ),
}  # fmt: skip
"""One-layer models, or two, of tasks other than causal language modelling; a LLaVA has four tokens 95 an image."""
