"""Llama-shaped model folders of any size, random, in bfloat16 shards, written tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spp_fx.storage.folder import INDEX_NAME
from spp_fx.storage.writer import write_safetensors

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """Tensors of one layer by name."""
        h, i, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (h, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
        }

    @property
    def layer_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.layer.values())


def write_llama(folder: Path, shape: Shape) -> int:
    """Write a model folder, one shard a layer and one for the rest; bytes of its tensors."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    words = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(200)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    rest = {
        "model.embed_tokens.weight": (VOCABULARY, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (VOCABULARY, shape.hidden),
    }
    shards: list[dict[str, tuple[int, ...]]] = [rest]
    for layer in range(shape.layers):
        shards.append({f"model.layers.{layer}.{name}": size for name, size in shape.layer.items()})
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def produce(tensor: str, sizes: dict[str, tuple[int, ...]] = tensors) -> Tensor:
            return random(sizes[tensor], generator)

        specs = [(tensor, "BF16", size) for tensor, size in tensors.items()]
        write_safetensors(folder / name, specs, produce, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(2 * torch.Size(size).numel() for size in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
    return total


def random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms are 1, matrices are as small as at the start of training."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
