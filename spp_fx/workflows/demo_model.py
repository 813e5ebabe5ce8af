"""A small Llama and its tokenizer, trained from scratch on text that every Python installation has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spp_fx.training.data import SEPARATOR
from spp_fx.training.progress import ProgressCallback
from spp_fx.training.rows import training_rows

BOS, EOS = SPECIAL = "<|bos|>", "<|eos|>"
VOCABULARY = 2048
WINDOW = 128
HELD_OUT = 10
"""Every so many topics, one is held out for evaluation."""


@dataclass(frozen=True)
class DemoText:
    """Training and held-out text as files, documents parted by separator lines."""

    train: Path
    valid: Path


def write_text(folder: Path) -> DemoText:
    """Python's own help topics, split by topic."""
    names = sorted(topics)
    text = DemoText(folder / "train.txt", folder / "valid.txt")
    valid = names[HELD_OUT // 2 :: HELD_OUT]
    for path, chosen in ((text.train, [n for n in names if n not in valid]), (text.valid, valid)):
        path.write_text(
            f"\n{SEPARATOR}\n".join(topics[name].strip() for name in chosen) + "\n", encoding="utf-8"
        )
    return text


def train_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts each document with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def train_model(
    folder: Path, text: Path, steps: int, update: Callable[[int, int, str], None], seed: int = 0
) -> None:
    """Train a Llama of about 1.3 million parameters and save it as a model folder.

    Args:
        folder: to write; must not exist.
        text: training text.
        steps: of 16 windows.
        update: called with steps done, steps in all, and a note.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(text)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=16,
        weight_decay=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(text, tokenizer, WINDOW, loss_on="all", packing=False)[0],
        callbacks=[ProgressCallback(update)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(type(callback))
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
