"""Folders that transformers cannot load: one line that says what, where and how to mend it; nothing is asked."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMultipleChoice,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.graph.model import check_task, hollow_model, load_model, meta_model
from spp_fx.training.samples import pad_token
from spp_fx.verbs.load import load_tokenizer
from tests.command import command, one_line, save_tokenizer
from tests.families import make_model


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    make_model("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def edit(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "removed"}))


def quantized(method: str, **more: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": method, **more}}


CONFIGS = {
    "pad": ({"pad_token_id": 128004}, ["pad_token_id 128004", "vocabulary of 96", "null"]),
    "pad-at-the-end": ({"pad_token_id": 96}, ["pad_token_id 96", "vocabulary of 96"]),
    "pad-negative": ({"pad_token_id": -300}, ["pad_token_id -300"]),
    "rope": ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, ["rope_parameters.rope_type 'ntk'"]),
    "rope-old": (
        {"rope_parameters": "removed", "rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling.type 'su'"],
    ),
    "rope-field": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["Missing required keys", "factor"]),
    "activation": ({"hidden_act": "swoosh"}, ["hidden_act 'swoosh'"]),
    "type": ({"model_type": "llama9"}, ["does not know model type 'llama9'", "newer", "--trust-remote-code"]),
    "no-type": ({"model_type": "removed"}, ["names no model_type"]),
    "heads": ({"num_attention_heads": 0}, ["num_attention_heads must not be 0"]),
    "heads-text": ({"num_attention_heads": "4"}, ["num_attention_heads", "expected int, got str"]),
    "dtype": ({"dtype": "float5"}, ["dtype 'float5'"]),
    "remote": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}},
        ["code of its own", "config.json", "--trust-remote-code"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("load", [load_model, meta_model, hollow_model])
@pytest.mark.parametrize(("config", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_makes_no_model_says_which_field(folder, config, words, load):
    edit(folder / "config.json", **config)
    with pytest.raises(FormatError) as raised:
        load(folder)
    for word in [str(folder), *words]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("config", "package"),
    [
        (quantized("gptq", bits=4, group_size=128), "optimum"),
        (quantized("awq", bits=4, group_size=128), "gptqmodel"),
        (quantized("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
        (quantized("compressed-tensors", config_groups={}, format="pack-quantized"), "compressed-tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_package_that_quantized_weights_need_is_named_with_the_method(folder, config, package):
    edit(folder / "config.json", **config)
    with pytest.raises(FormatError) as raised:
        load_model(folder)
    for word in (config["quantization_config"]["quant_method"], package, "before it was quantized"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"intermediate_size": 80}, ["down_proj.weight is stored as [32, 64]", "has [32, 80]", "and 1 more"]),
        ({"num_key_value_heads": 1}, ["k_proj.weight is stored as [16, 32]", "has [8, 32]"]),
        ({"vocab_size": 50}, ["is stored as [96, 32]", "has [50, 32]"]),
        ({"num_hidden_layers": 3}, ["lacks 9", "model.layers.2.input_layernorm.weight"]),
    ],
    ids=str,
)
def test_weights_of_other_shapes_are_named_as_in_the_load_report(folder, config, words, capfd):
    edit(folder / "config.json", **config)
    with pytest.raises(FormatError) as raised:
        load_model(folder)
    for word in words:
        assert word in str(raised.value)
    assert "above report" not in str(raised.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


TOKENIZERS = {
    "none": (lambda f: [p.unlink() for p in f.glob("*token*")], "the folder has no tokenizer"),
    "cut": (lambda f: (f / "tokenizer.json").write_text('{"a"'), "tokenizer.json is not valid JSON"),
    "of-another-kind": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "tokenizer.json is not what"),
    "config-cut": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not valid"),
    "config-list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json is not a JSON"),
    "no-vocabulary": (
        lambda f: [
            (f / "tokenizer.json").unlink(), edit(f / "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        ],
        "none of tokenizer.model, tokenizer.json",
    ),
    "no-sentencepiece-file": (
        lambda f: [
            (f / "tokenizer.json").unlink(), edit(f / "tokenizer_config.json", tokenizer_class="XLNetTokenizer"),
        ],
        "none of spiece.model, tokenizer.json",
    ),
    "remote": (
        lambda f: edit(
            f / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["modeling_mine.T", None]}
        ),
        "auto_map of tokenizer_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_cannot_be_loaded_says_which_file(folder, damage, words):
    (folder / "modeling_mine.py").write_text("raise SystemExit('ran')")
    damage(folder)
    with pytest.raises(UsageError) as raised:
        load_tokenizer(folder)
    assert f"{folder}: its tokenizer cannot be loaded: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("package", ["sentencepiece", "mamba_ssm"])
def test_a_missing_package_is_no_internal_error(folder, monkeypatch, package):
    def from_pretrained(*args, **kwargs):
        raise ImportError(
            f"\n MyTokenizer requires the {package} library\nbut it was not found. Install it.\n"
        )

    for auto in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{auto}.from_pretrained", from_pretrained)
    for load in (load_tokenizer, load_model):
        with pytest.raises(
            SppFxError, match=f"a package is missing: MyTokenizer requires the {package} library but"
        ):
            load(folder)


LAYER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SMALL = {
    "vocab_size": 64,
    **LAYER,
}
OTHERS = {
    "BertForMultipleChoice": lambda: BertForMultipleChoice(BertConfig(**SMALL)),
    "ViTForMaskedImageModeling": lambda: ViTForMaskedImageModeling(
        ViTConfig(**LAYER, image_size=16, patch_size=8, encoder_stride=8)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_no_known_task_is_called_by_its_name_and_not_damaged(tmp_path, name):
    OTHERS[name]().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b c")
    result = command("eval", tmp_path / "model", "--data", tmp_path / "text.txt", "-q")
    assert result.code == 2
    said = one_line(result.err)
    assert f"it holds a {name}" in said
    assert "eval takes models for causal-lm, seq2seq-lm, masked-lm" in said
    assert "damaged" not in said


def test_a_model_without_its_head_is_called_by_its_name(tmp_path):
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(FormatError, match=r"lm_head\.weight.*it holds a LlamaModel"):
        load_model(tmp_path / "model")


def test_a_model_of_pictures_and_text_is_left_to_loading(folder):
    edit(folder / "config.json", architectures=["Gemma3ForConditionalGeneration"])
    check_task(folder, "this verb", ("causal-lm",))


def test_a_row_is_never_filled_with_a_token_that_the_model_lacks(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 28
    assert pad_token(tokenizer, 28) == tokenizer.eos_token_id == 27
    assert pad_token(tokenizer, 29) == 28


@pytest.mark.parametrize("verb", ["eval {} --data {}", "prune {} -o {}-out", "inspect {}"])
def test_code_of_a_folder_never_runs_whatever_stdin_answers(folder, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    (tmp_path / "text.txt").write_text("a b c")
    (folder / "modeling_mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nM = T = C\n"
    )
    names = {"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"}
    edit(folder / "config.json", model_type="mine", auto_map=names)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="T",
        auto_map={"AutoTokenizer": ["modeling_mine.T", None]},
    )
    words = verb.format(folder, tmp_path / "text.txt").split()
    done = command(*words, "-q")
    assert done.code == 1
    assert "--trust-remote-code" in one_line(done.err)
    assert not (tmp_path / "ran").exists()


def test_an_index_without_metadata_is_named(tmp_path):
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(FormatError, match="has no metadata"):
        load_model(folder)
