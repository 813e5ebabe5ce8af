"""A small random model of any type that transformers registers, made from its configuration class.

Fields are shrunk by their names, in nested configurations as well. What the names do not tell stands in `EXCEPTIONS`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 256
WIDTH, HEADS, HEAD, FFN = 64, 4, 16, 128  # multiples of 64, so that cuSPARSELt takes them

TASKS: dict[str, tuple[str, Any]] = {
    "causal-lm": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "masked-lm": ("MASKED_LM", transformers.AutoModelForMaskedLM),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION", transformers.AutoModelForSequenceClassification),
    "token-classification": ("TOKEN_CLASSIFICATION", transformers.AutoModelForTokenClassification),
    "question-answering": ("QUESTION_ANSWERING", transformers.AutoModelForQuestionAnswering),
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", transformers.AutoModelForSeq2SeqLM),
    "feature-extraction": ("TEXT_ENCODING", transformers.AutoModel),
    "image-classification": ("IMAGE_CLASSIFICATION", transformers.AutoModelForImageClassification),
    "speech-seq2seq": ("SPEECH_SEQ_2_SEQ", transformers.AutoModelForSpeechSeq2Seq),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT", transformers.AutoModelForImageTextToText),
}
"""Task -> the table of transformers' types, and the auto class."""
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
"""Types that look both ways unless they are told to be decoders."""

# The first that matches a field's name counts; None keeps the default.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"acoustic_.*|type_vocab_size|(num|n)_(shared|zero)_experts|moe_num_shared_experts|initial_.*", None),
    (r".*vocab_size(_per_layer_input)?", VOCABULARY),
    (r".*(moe|expert|shared).*(intermediate|hidden|ffn_hidden)_size|expert_dim", WIDTH),
    (
        r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|d_ff|d_inner|dff|dim_ff|.*mlp_dim|feed_forward_size",
        FFN,
    ),
    (r"hidden_size_per_layer_input|.*lora_rank|.*_rank|laurel_rank|adapter_rank|d_rel|rotary_dim_", HEAD),
    (
        r"hidden_size_global|.*hidden_size|d_model|n_embd|dim|hidden_dim|input_embedding_size|output_embedding_size",
        WIDTH,
    ),
    (
        r".*embed(ding)?_(dim|size|proj_dim)|emb_dim|lru_width|.*(projector|projection|vision|adapter).*_dim",
        WIDTH,
    ),
    (
        r"(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder|num_global)_layers?|layers|depth|resampler_depth",
        2,
    ),
    (
        r"(.*_)?(n|num|linear_num)_(key_value|kv|key|value)_heads|kv_n_heads|num_query_groups|indexer_kv_heads",
        2,
    ),
    (r"mamba_(n|num)_heads", 2 * WIDTH // HEAD),
    (r"(mamba_)?n_?groups", 2),
    (r"(.*_)?(num_heads|n_heads?|num_attention_heads|attention_heads|n_mamba_heads)", HEADS),
    (r"(qk_rope|qk_nope)_head_dim|rotary_dim", HEAD // 2),
    (r"(.*_)?(head_dim|d_head|d_kv|kv_channels|dim_head|attention_head_size|query_pre_attn_scalar)", HEAD),
    (r"(num|moe_num|num_local|n_routed)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(.*_)?(state_size|d_state)", HEAD),
    (
        r"(.*_)?chunk_size|index_topk|(.*_)?window_size|sliding_window(_size)?|attention_window_size|local_attention",
        8,
    ),
    (
        r"(.*_)?(max_position_embeddings|max_seq_len|n_positions|n_ctx|context_length)|max_(target|source)_positions",
        128,
    ),
    (r"model_max_length|rel_extent", 128),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"num_filters", 4),
    (r"mm_tokens_per_image", 4),
    (r"image_seq_length|num_image_tokens", 16),
)
# Of fields that hold one number for each stage of a network.
STAGES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (r"depths?|layers_per_stage", lambda stage, default: min(default, 2)),
    (r"num_(attention_)?heads", lambda stage, default: 2**stage),
    (r"(.*_)?hidden_sizes|embed_dims?", lambda stage, default: min(32 * 2**stage, 256)),
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def types_of(task: str) -> list[str]:
    """The types that transformers registers for a task, sorted."""
    return sorted(getattr(modeling_auto, f"MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES"))


def small_config(task: str, model_type: str) -> PretrainedConfig:
    """The configuration of a type with small sizes, and every kind of layer that its default has."""
    made = CONFIG_MAPPING[model_type]
    exceptions = EXCEPTIONS.get(model_type, {})
    if task == "causal-lm":
        exceptions = exceptions | CAUSAL.get(model_type, {})
    try:
        default = made().to_dict()
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError):
        if not exceptions:
            raise
        default = {}  # its default is not valid
    values = _with(_shrunk(default), exceptions)
    values.pop("model_type", None)
    if task == "causal-lm" and model_type in MASKED:
        values["is_decoder"] = True
    return made(**{name: value for name, value in values.items() if value is not DROPPED})


def small_model(task: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and eval mode; no parameter is all zeros or all ones."""
    torch.manual_seed(seed)
    config = small_config(task, model_type)
    config.architectures = []  # of two classes of a type, the first
    model = TASKS[task][1].from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # zeros hold any pattern, and a bias of zeros that is lost is not missed
        for parameter in model.parameters():
            if parameter.is_floating_point() and float(parameter.std(correction=0)) < 1e-3:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _shrunk(default: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that shrink its default, given as its dict."""
    ordinary = PretrainedConfig().to_dict()
    values: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict):
            if "model_type" in value:
                values[name] = _shrunk(value) | {"model_type": value["model_type"]}
        elif isinstance(value, int) and not isinstance(value, bool) and name not in ordinary:
            rule = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)
            if rule is not None and value > 0:
                values[name] = min(rule, value)
        elif isinstance(value, list) and all(type(each) is int for each in value):
            rule = next((size for pattern, size in STAGES if re.fullmatch(pattern, name)), None)
            if rule is not None:
                values[name] = [rule(stage, each) for stage, each in enumerate(value)]
    if default.get("kv_lora_rank") and "num_key_value_heads" in default:
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
    values |= _layers(default)
    values |= _tokens(default)
    if rope := _rope(default, values):
        values["rope_parameters"] = rope
    return values


def _layers(default: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and lists of one item a layer: the first layers in which all kinds occur, at least two."""
    count = next((name for name in LAYERS if isinstance(default.get(name), int)), None)
    if count is None:
        return {}
    every = {
        name: value
        for name, value in default.items()
        if isinstance(value, list)
        and len(value) == default[count] > 3
        and len({str(v) for v in value}) < len(value)
    }
    if not every:
        return {}
    chosen: list[int] = []
    for at in range(default[count]):
        new = any(str(v[at]) not in {str(v[i]) for i in chosen} for v in every.values())
        if new or (at < 2 and all(len({str(each) for each in v}) == 1 for v in every.values())):
            chosen.append(at)
    if len(chosen) < 2:
        chosen.append(next(at for at in range(default[count]) if at not in chosen))
    return {name: [v[at] for at in sorted(chosen)] for name, v in every.items()} | {count: len(chosen)}


def _tokens(default: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of special tokens: small ones for the ends of a text, the vocabulary's last ones for the others."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values: dict[str, Any] = {name: at for name, at in special.items() if default.get(name) is not None}
    if "pad_token_id" in default:
        values["pad_token_id"] = 0  # a classifier of texts finds their ends by it
    if default.get("is_encoder_decoder"):
        values["decoder_start_token_id"] = 0
    last = VOCABULARY
    for name, value in default.items():
        if (
            name not in special
            and re.fullmatch(r".*_token_(id|index)", name)
            and isinstance(value, int)
            and value > 9
        ):
            last -= 1
            values[name] = last
    return values


def _rope(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rotary embeddings whose sections add up to half a head, where the default has sections."""
    rope = default.get("rope_parameters") or {}
    if "mrope_section" not in rope:
        return None
    pairs = int(values.get("head_dim", HEAD) * rope.get("partial_rotary_factor", 1.0)) // 2
    share = pairs // len(rope["mrope_section"])
    sections = [share] * len(rope["mrope_section"])
    return {**rope, "mrope_section": [pairs - sum(sections[1:]), *sections[1:]]}


def _with(values: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others put in, nested."""
    merged = dict(values)
    for name, value in others.items():
        inner = merged.get(name)
        merged[name] = _with(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


DROPPED = object()
"""Value of a field that is left to the class, which computes it from others."""

EXCEPTIONS: dict[str, dict[str, Any]] = {}


def _except(*model_types: str, **values: Any) -> None:
    for model_type in model_types:
        EXCEPTIONS[model_type] = _with(EXCEPTIONS.get(model_type, {}), values)


# What is None by default, and needed.
_except("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", head_dim=HEAD)
_except("hunyuan_v1_moe", num_experts=4, moe_topk=2)
_except("nemotron", num_key_value_heads=2)
_except("deepseek_v2", num_experts_per_tok=2, n_group=1, topk_group=1)
_except("dots1", n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
# Heads whose sizes follow from others.
_except("axk1", "deepseek_v3", "longcat_flash", "youtu", head_dim=HEAD // 2)
# Two kinds of layers among two.
_except("deepseek_v2", "deepseek_v3", "dots1", first_k_dense_replace=1)
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [FFN] * 4,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
_except("gemma3n_text", **_SHARED)
_except("gemma3n", text_config=_SHARED)
_except(
    "gemma4_assistant",
    "gemma4_unified_assistant",
    backbone_hidden_size=WIDTH,
    text_config={
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "head_dim": HEAD,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "per_layer_config": {},
    },
)
_except(
    "gemma4_assistant",
    text_config={
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
)
_except("bamba", attn_layer_indices=[1])
_except("falcon_h1", mamba_d_ssm=2 * WIDTH)
_except("granitemoehybrid", layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
_except("mamba2", num_heads=2 * WIDTH // HEAD)
_except("lfm2_moe", layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1)
_except(
    "zamba",
    "zamba2",
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    num_hidden_layers=4,
    num_key_value_heads=HEADS,
)
_except("zamba", attention_hidden_size=2 * WIDTH, attention_head_dim=2 * HEAD, mamba_dt_rank=8)
_except("zamba2", n_mamba_heads=8, mamba_ngroups=1)
_except("zamba2", **dict.fromkeys(("attention_hidden_size", "attention_head_dim", "mamba_headdim"), DROPPED))
_except("zamba2", **dict.fromkeys(("kv_channels", "num_query_groups", "hybrid_layer_ids"), DROPPED))
_except(
    "jamba", num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2
)  # experts in every other layer
_except("recurrent_gemma", num_hidden_layers=3)
_except("inkling_text", "minimax_m3_vl_text", mlp_layer_types=["dense", "sparse"], num_hidden_layers=2)
_except("flint", mlp_only_layers=[0])
_except("ernie4_5_moe", moe_layer_start_index=1, moe_layer_end_index=1)
# What the sizes of other fields must agree with.
_except("falcon_h1", mamba_d_head=HEAD, mamba_n_heads=8)
_except(
    "cohere_compass_text",
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    },
)
_INDEXER = {"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD}
_INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
_except("qwen4_exp_text", **_INDEXER)
_except("qwen4_exp", text_config=_INDEXER)
_except(
    "roc_bert",
    shape_vocab_size=64,
    pronunciation_vocab_size=64,
    pronunciation_embed_dim=32,
    shape_embed_dim=32,
)
_except("mpt", attn_config={"alibi": True})
_except("cpmant", prompt_length=4)
_except("dbrx", attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0})
_except(
    "dbrx",
    ffn_config={"ffn_hidden_size": FFN, "hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
)
_except("blt", encoder_hash_byte_group_vocab=64, encoder_hash_byte_group_size=[3])
_except(
    "dots3_note",
    audio_config={"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH, "downsample_hidden_size": HEAD},
    vision_config={"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
)
_except("phi4_multimodal", vision_config={"image_size": 32, "crop_size": 32, "patch_size": 8})
_except(
    "phi4_multimodal",
    audio_config={"num_blocks": 2, "ext_pw_out_channel": WIDTH, "depthwise_separable_out_channel": WIDTH}
    | {"nemo_conv_channels": WIDTH, "input_size": 16, "nemo_final_size": 2, "bias_max_distance": 16},
)
_except("esm", vocab_size=VOCABULARY)
_except("esmc", num_key_value_heads=HEADS)
_except("perceiver", d_latents=WIDTH, num_latents=16, num_self_attends_per_block=2, qk_channels=WIDTH)
_except("hunyuan_vl", text_config={"head_dim": HEAD})
_except("fun_asr_nano", adaptor_config={"intermediate_size": 16})
_except("kyutai_speech_to_text", codec_config={"upsample_groups": WIDTH})
_except("swin", "swinv2", "donut-swin", "maskformer-swin", image_size=64, window_size=2)
_except("levit", image_size=64, patch_size=16)
_except("mobilevit", "mobilevitv2", "swiftformer", "pvt", "pvt_v2", image_size=64)
_except("textnet", hidden_sizes=DROPPED)
_except("efficientnet", hidden_dim=320)
_except("efficientnet", width_coefficient=0.25, depth_coefficient=0.2)
_except("glm5_next", text_config={"index_kpool": 4})
_except("mobilebert", true_hidden_size=WIDTH, intra_bottleneck_size=WIDTH, embedding_size=WIDTH)
_except("bit", num_groups=8)
_except("cvt", depth=[1, 2, 3])  # the last stage has as many layers as there are stages
_except("molmo2", adapter_config={"vision_feature_layer": [-1, -2]})
_except("chameleon", vocabulary_map={"<image>": 8})
_except("granite4_vision", deepstack_layer_map=[[-1, 0], [-2, 1]])
_except("diffusion_gemma", text_config={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": WIDTH})
_except(
    "deepseek_ocr2",
    "unlimited_ocr",
    text_config={"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
)
_except("ernie4_5_vl_moe", text_config={"rope_parameters": {"rope_theta": 5e5, "mrope_section": [3, 3, 2]}})
_except("ernie4_5_vl_moe", text_config={"rope_parameters": {"rope_type": "default"}})
_except("nemotron_h_omni", vision_config={"video_temporal_patch_size": 2})
_except("cohere_compass", text_config=EXCEPTIONS["cohere_compass_text"])
# What makes a causal language model of them, which they are not by default.
_except("reformer", axial_pos_shape=[8, 16], axial_pos_embds_dim=[32, 32], num_buckets=4)
_except("reformer", attn_layers=["local", "lsh"], local_attn_chunk_length=8, lsh_attn_chunk_length=8)
_except("xmod", default_language="en_XX")

CAUSAL: dict[str, dict[str, Any]] = {"xlm": {"causal": True}}
"""What makes a causal language model of a type that is not one by default; others have `is_decoder`."""
