"""Small random models of each task, and records of data for them."""

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
IMAGE = VOCABULARY
"""Token of an image's parts."""
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = LAYERS | {"vocab_size": VOCABULARY, "hidden_size": 16, "max_position_embeddings": 64}
PICTURE = LAYERS | {"hidden_size": 16, "image_size": 16, "patch_size": 8}
RATE = 16_000


def t5() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip


def whisper() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


def llava() -> LlavaConfig:
    text = LlamaConfig(**TEXT | {"vocab_size": VOCABULARY + 1}, num_key_value_heads=1)
    vision = CLIPVisionConfig(**PICTURE | {"num_hidden_layers": 2}, projection_dim=16)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=4)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "masked-lm": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "sequence-classification": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "token-classification": lambda: BertForTokenClassification(BertConfig(**TEXT)),
    "question-answering": lambda: BertForQuestionAnswering(BertConfig(**TEXT)),
    "feature-extraction": lambda: BertModel(BertConfig(**TEXT)),
    "seq2seq-lm": lambda: T5ForConditionalGeneration(t5()),
    "image-classification": lambda: ViTForImageClassification(ViTConfig(**PICTURE)),
    "speech-seq2seq": lambda: WhisperForConditionalGeneration(whisper()),
    "image-text-to-text": lambda: LlavaForConditionalGeneration(llava()),
}


def make(task: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[task]().eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token; a pair has segments 0 and 1."""
    fast = Tokenizer(models.WordLevel({t: n for n, t in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>", model_input_names=[
            "input_ids", "token_type_ids", "attention_mask",
        ],
    )  # fmt: skip


def save(task: str, folder: Path) -> PreTrainedModel:
    """A model folder with what makes inputs of records."""
    model = make(task)
    model.save_pretrained(folder)
    if task == "image-classification":
        options = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_normalize": False}
        kind = {"image_processor_type": "ViTImageProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(kind | options))
        return model
    tokenizer().save_pretrained(folder)
    if task == "speech-seq2seq":
        WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400).save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["processor_class"] = "WhisperProcessor"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def record(task: str, draw: np.random.Generator, number: int) -> dict[str, Any]:
    def said(count: int) -> list[str]:
        return [str(word) for word in draw.choice(WORDS, count)]

    if task == "sequence-classification":
        return {"sentence1": " ".join(said(4)), "sentence2": " ".join(said(3)), "label": number % 2}
    if task == "token-classification":
        words = said(5)
        return {"tokens": words, "ner_tags": [int(word in WORDS[:20]) for word in words]}
    if task == "question-answering":
        words = [*dict.fromkeys(said(8))]
        context = " ".join(words)
        answer = f"{words[1]} {words[2]}"
        return {
            "question": words[1],
            "context": context,
            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
        }
    if task == "seq2seq-lm":
        words = said(5)
        return {"source": " ".join(words), "target": " ".join(reversed(words))}
    if task == "image-classification":
        return {"image": f"{number % 2}.png", "label": f"LABEL_{number % 2}"}
    if task == "speech-seq2seq":
        return {"audio": f"{number % 2}.wav", "text": " ".join(said(3))}
    return {"text": " ".join(said(9))}


def write(task: str, path: Path, count: int = 12) -> Path:
    """Records of a task as JSON lines, with the files that they name."""
    draw = np.random.default_rng(0)
    path.write_text("".join(json.dumps(record(task, draw, n)) + "\n" for n in range(count)))
    for number in range(2):
        if task == "image-classification":
            from PIL import Image

            pixels = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path.parent / f"{number}.png")
        if task == "speech-seq2seq":
            with wave.open(str(path.parent / f"{number}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes(draw.integers(-9000, 9000, RATE // 4, dtype=np.int16).tobytes())
    return path
