"""Models without weights are tied exactly where from_pretrained ties: it decides by what the folder stores."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
)

from spp_fx.graph.model import hollow_model, meta_model
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.storage.folder import ModelFolder
from tests.command import must
from tests.families import SMALL

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LLAMA = LlamaConfig(**SMALL, intermediate_size=32, tie_word_embeddings=True)


def save(folder, config, change, auto=AutoModelForCausalLM, **said):
    """A folder of a random model whose stored tensors are `change(tensors)`; `said` goes into config.json."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


def groups(model):
    """The sets of names that stand for one parameter."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(name)
    return sorted(map(sorted, found.values()))


def check_tied_as_transformers(folder, auto=AutoModelForCausalLM):
    loaded = auto.from_pretrained(folder)
    for made in (meta_model(folder), hollow_model(folder)):
        assert groups(made) == groups(loaded)
        assert made.all_tied_weights_keys == loaded.all_tied_weights_keys
    return [HEAD, EMBEDDING] in groups(loaded)


def both(scale):
    return lambda t: t | {HEAD: t[EMBEDDING] * scale}


STORED = {
    "the embedding only": (lambda t: t, {}, True),
    "the head only": (
        lambda t: {HEAD if name == EMBEDDING else name: value for name, value in t.items()},
        {},
        True,
    ),
    "both, different": (both(1.5), {}, False),
    "both, equal": (both(1), {}, True),
    "both, different in the last row": (
        lambda t: t | {HEAD: torch.cat([t[EMBEDDING][:-1], t[EMBEDDING][-1:] + 1])},
        {},
        False,
    ),
    "both, equal where they are rounded": (both(1 + 2**-20), {"dtype": "bfloat16"}, True),
    "both, one in half precision": (lambda t: t | {HEAD: t[EMBEDDING].half()}, {}, False),
    "both, equal but for the sign of zero": (
        lambda t: t | {EMBEDDING: torch.zeros_like(t[EMBEDDING]), HEAD: -torch.zeros_like(t[EMBEDDING])},
        {},
        True,
    ),
    "both, not numbers": (
        lambda t: t | dict.fromkeys((HEAD, EMBEDDING), t[EMBEDDING] * torch.nan),
        {},
        False,
    ),
    "neither": (lambda t: {name: value for name, value in t.items() if name != EMBEDDING}, {}, True),
    "both, equal, of a model that is not tied": (both(1), {"tie_word_embeddings": False}, False),
    "no prefix, both, different": (
        lambda t: {k.removeprefix("model."): v for k, v in both(2)(t).items()},
        {},
        False,
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_a_head_is_tied_where_transformers_ties_it(case, tmp_path):
    change, said, tied = STORED[case]
    folder = save(tmp_path, LLAMA, lambda t: {k: v.clone() for k, v in change(t).items()}, **said)
    assert check_tied_as_transformers(folder) == tied


def test_stored_heads_are_compared_block_by_block(tmp_path, monkeypatch):
    folder = save(tmp_path, LLAMA, lambda t: {k: v.clone() for k, v in both(1)(t).items()})
    read, blocks = ModelFolder.row_blocks, []

    def row_by_row(self, name):
        for block in read(self, name, 1):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(ModelFolder, "row_blocks", row_by_row)
    assert meta_model(folder).all_tied_weights_keys == {HEAD: EMBEDDING}
    assert blocks == [1] * SMALL["vocab_size"]


def test_another_prefix_is_another_name_of_the_same_weight(tmp_path):
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)

    def change(tensors):
        short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return short | {HEAD: short["wte.weight"] + 1}

    folder = save(tmp_path, config, change)
    check_tied_as_transformers(folder)
    assert meta_model(folder).all_tied_weights_keys == {}


def test_the_language_model_of_a_multimodal_folder_is_tied_as_transformers_ties_it(tmp_path):
    config = Gemma3Config(
        text_config={
            "vocab_size": 96,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_index=95,
    )
    name = "language_model.model.embed_tokens.weight"  # as stored; transformers has another order of modules

    def change(tensors):
        (embedding,) = (value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
        return tensors | {"language_model.lm_head.weight": embedding + 1}

    folder = save(tmp_path, config, change)
    assert name in load_file(folder / "model.safetensors")
    check_tied_as_transformers(folder)
    assert meta_model(folder).all_tied_weights_keys == {}


def test_weights_of_several_names_are_tied_as_transformers_ties_them(tmp_path, monkeypatch):
    """BART shares one embedding four times: every choice of what is stored, in two values."""
    config = BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight")
    names += ("model.decoder.embed_tokens.weight", HEAD)
    kinds = set()
    base = save(tmp_path / "base", config, lambda t: t, AutoModelForSeq2SeqLM)
    tensors = load_file(base / "model.safetensors")
    value = tensors[names[0]]
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}
    for number, choice in enumerate(itertools.product((None, 1, 2), repeat=4)):
        if number % 3:
            continue  # every third will do
        folder = shutil.copytree(base, tmp_path / str(number))
        stored = {name: value * scale for name, scale in zip(names, choice, strict=True) if scale}
        save_file(rest | stored, folder / "model.safetensors", {"format": "pt"})
        check_tied_as_transformers(folder, AutoModelForSeq2SeqLM)
        kinds.add(len(groups(meta_model(folder))))
    assert len(kinds) > 2


def test_a_folder_of_config_json_alone_follows_it(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    for made in (meta_model(tmp_path), hollow_model(tmp_path)):
        assert [HEAD, EMBEDDING] in groups(made)


@pytest.mark.parametrize(
    ("scale", "tied", "reason"),
    [(1, EMBEDDING, f"tied to the embedding {EMBEDDING}"), (1.5, None, "makes the logits")],
)
def test_a_program_is_tied_as_its_model(scale, tied, reason, tmp_path):
    folder = save(tmp_path, LLAMA, lambda t: {k: v.clone() for k, v in both(scale)(t).items()})
    program = trace(meta_model(folder))
    assert program.tied == ({HEAD: tied} if tied else {})
    _, matched = run_pipeline(program, [Canonicalize(), Match(dense=True)])
    assert (program.sites[HEAD].tied_to, program.sites[HEAD].is_head) == (tied, True)
    assert reason in matched.skipped[HEAD]


def test_a_head_of_its_own_is_kept_beside_the_embedding(tmp_path):
    folder = save(tmp_path / "dense", LLAMA, lambda t: {k: v.clone() for k, v in both(1.5)(t).items()})
    assert f"{HEAD}: makes the logits" in must("prune", folder, "-o", tmp_path / "sparse").out
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "sparse"))
    for name in (HEAD, EMBEDDING):
        assert torch.equal(before[name], after[name])
    check_tied_as_transformers(tmp_path / "sparse")
