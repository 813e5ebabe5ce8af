"""Every matrix of an artifact is judged or named: nothing says ok of a weight that it never looked at."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM as Causal
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoConfig,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    MptConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    dynamic_module_utils,
)

from spp_fx.verbs.inspect import inspect
from spp_fx.verbs.verify import verify
from tests.command import command, must, one_line, rewrite
from tests.effort import examples
from tests.families import SMALL, make_model
from tests.handmade import Raw, save, sparse

Q = "model.layers.0.self_attn.q_proj.weight"
EXTRA = "model.layers.2.mtp.proj.weight"

ONE = SMALL | {"num_hidden_layers": 1}
WHISPER = WhisperConfig(
    vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=32,
    max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
BART = BartConfig(
    vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
)  # fmt: skip
BERT = BertConfig(**SMALL, intermediate_size=64)
ROBERTA = RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=66)
JETMOE = JetMoeConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=64,
    num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
GEMMA3 = Gemma3Config(
    text_config={**ONE, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 16},
    vision_config={
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    },
    mm_tokens_per_image=4,
)  # fmt: skip
GPT_NEO = GPTNeoConfig(
    vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
    max_position_embeddings=64,
)  # fmt: skip
DYNAMIC = LlamaConfig(
    **ONE, intermediate_size=64, num_key_value_heads=2,
    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
)  # fmt: skip
MPT = MptConfig(vocab_size=96, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
QWEN2_MOE = Qwen2MoeConfig(
    **ONE, num_key_value_heads=2, intermediate_size=64, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=32,
)  # fmt: skip


def pruned(folder: Path, model: PreTrainedModel) -> dict:
    """Prune a model to 2:4 into FOLDER/sparse; what the command said."""
    model.save_pretrained(folder / "dense")
    return must("prune", folder / "dense", "-o", folder / "sparse", "--json").json


def matrices(folder: Path) -> set[str]:
    return {
        name
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
        if sum(size > 1 for size in value.shape) > 1
    }


def accounted(folder: Path, verdict) -> None:
    """Every stored matrix is a site that was judged, or stands among those that were not."""
    judged = {site.name for site in verdict.sites}
    named = verdict.left_out.keys() | verdict.unread.keys() | set(verdict.allowed_dense)
    assert matrices(folder) - judged - named == set()
    assert not judged & named


PIECES = {
    "sparse": ("model.layers.{}.up_proj.weight", sparse(8, 16), "site"),
    "stack": ("model.layers.{}.experts.gate_up_proj", None, "site"),
    "dense": ("model.layers.{}.down_proj.weight", Raw("F32", np.ones((8, 16), dtype="<u4")), "dense"),
    "embedding": ("model.embed_{}.weight", Raw("F32", np.ones((8, 16), dtype="<u4")), "left_out"),
    "norm": ("model.layers.{}.input_layernorm.weight", Raw("F32", np.ones((8,), dtype="<u4")), "vector"),
    "embedder": (
        "embedder.layers.{}.norm1.linear.weight",
        Raw("F32", np.ones((8, 16), dtype="<u4")),
        "dense",
    ),
    "unnamed": ("model.layers.{}.table", Raw("F32", np.ones((8, 16), dtype="<u4")), "unread"),
    "convolution": ("model.layers.{}.conv1d.weight", Raw("F32", np.ones((8, 1, 4), dtype="<u4")), "unread"),
    "kernel": ("model.patch_{}.projection.weight", Raw("F32", np.ones((8, 3, 4, 4), dtype="<u4")), "unread"),
    "blocks": (
        "model.layers.{}.experts.down_proj_blocks",
        Raw("F32", np.ones((2, 8, 4), dtype="<u4")),
        "unread",
    ),
}
STACK = Raw("F32", np.stack([sparse(8, 16, seed=seed).bits for seed in range(2)]))


@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=8))
@examples(10)
def test_a_file_made_of_known_pieces_is_accounted_for(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("pieces") / "weights.safetensors"
    roles: dict[str, str] = {}
    tensors: dict[str, Raw] = {}
    for number, kind in enumerate(kinds):
        name, raw, role = PIECES[kind]
        roles[name.format(number)], tensors[name.format(number)] = role, raw or STACK
    save(path, tensors)
    if not set(roles.values()) & {"site", "dense"}:
        result = command("verify", path, "--pattern", "2:4", "--coverage", "all")
        assert result.code == 1, "nothing was looked at, so nothing holds"
        return
    for coverage in ("lock", "all"):
        verdict = verify(path, pattern="2:4", coverage=coverage)
        found = {name: role for role in ("left_out", "unread") for name in getattr(verdict, role)}
        found |= {site.name: "site" if site.ok else "dense" for site in verdict.sites}
        assert found == {name: role for name, role in roles.items() if role != "vector"}
        broken = "dense" in roles.values() or (coverage == "all" and "unread" in roles.values())
        assert verdict.ok is not broken
        if coverage == "all":
            assert {f.message.split(":")[0] for f in verdict.faults} == set(verdict.unread)
    count = sum(role == "unread" for role in roles.values())
    text = command("verify", path, "--pattern", "2:4").out
    assert (f"{count} other weight" in text) == (count > 0 and "dense" not in roles.values())


def test_a_weight_that_the_model_does_not_have_is_named_and_fails_under_coverage(world):
    rewrite(world / "sparse" / "model.safetensors", lambda v: v.update({EXTRA: torch.ones(32, 32)}))
    verdict = verify(world / "sparse", pattern="2:4")
    assert verdict.ok
    assert set(verdict.unread) == {EXTRA}
    text = must("verify", world / "sparse", "--pattern", "2:4").out
    assert "1 other weight not checked" in text
    assert EXTRA in text
    result = command("verify", world / "sparse", "--coverage", "all", "--json")
    assert result.code == 1
    assert [EXTRA in problem for problem in result.json["problems"]] == [True]
    assert verify(world / "sparse", coverage="all", allow_dense=["mtp.proj"]).ok


@pytest.mark.parametrize("form", ["file", "shard", "export"])
def test_what_the_model_does_not_have_is_named_in_every_form(world, form):
    folder = world / ("sharded" if form == "shard" else "sparse")
    path = sorted(folder.glob("*.safetensors"))[-1]
    rewrite(path, lambda v: v.update({EXTRA: torch.ones(32, 32)}))
    if form == "shard":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][EXTRA] = path.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if form == "export":
        must("export", folder, "-o", world / "out", "--format", "cusparselt", "-q")
        path = world / "out"
    verdict = verify(path, pattern="2:4", coverage="all")
    assert set(verdict.unread) == {EXTRA}
    assert not verdict.ok


def test_a_lock_alone_says_how_many_weights_it_does_not_name(world):
    must("verify", world / "sparse")
    verdict = verify(world / "sparse")
    assert set(verdict.unread) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "2 other weights not checked" in must("verify", world / "sparse").out
    accounted(world / "sparse", verdict)


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (lambda: WhisperForConditionalGeneration(WHISPER), 32),
        (lambda: BartForConditionalGeneration(BART), 32),
        (lambda: RobertaForSequenceClassification(ROBERTA), 12),
    ],
    ids=["whisper", "bart", "roberta"],
)
def test_a_model_of_another_task_is_taken_whole(tmp_path, make, sites):
    """Encoder, decoder and cross attention: AutoModelForCausalLM would make a decoder of it and lose the rest."""
    model = make()
    said = pruned(tmp_path, model)
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    taken = {site["name"] for site in said["sites"]}
    assert len(taken) == sites
    assert linears <= taken | said["refused"].keys()
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4)
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    verdict = verify(tmp_path / "merged", pattern="2:4")
    assert verdict.ok
    assert len(verdict.sites) == sites
    accounted(tmp_path / "merged", verdict)
    locked = must(
        "lock", tmp_path / "merged", "-o", tmp_path / "again.json", "--pattern", "2:4", "--json"
    ).json
    assert {site["name"] for site in locked["sites"]} == taken
    assert matrices(tmp_path / "merged") - taken <= locked["left_out"].keys()
    seen = inspect(tmp_path / "merged")
    assert {view.site.name for view in seen.sites} == linears


@pytest.mark.parametrize(
    ("make", "unread"),
    [
        (lambda: JetMoeForCausalLM(JETMOE), "linear.weight"),
        (lambda: Gemma3ForConditionalGeneration(GEMMA3), "vision"),
    ],
    ids=["jetmoe", "gemma3"],
)
def test_linears_that_the_trace_does_not_reach_or_understand_are_named(tmp_path, make, unread):
    said = pruned(tmp_path, make())
    assert any(unread in name for name in said["refused"])
    assert not any("router" in site["name"] or unread in site["name"] for site in said["sites"])
    verdict = verify(tmp_path / "sparse", pattern="2:4")
    assert verdict.ok
    assert verdict.unread
    assert all(unread in name or "multi_modal" in name for name in verdict.unread)
    accounted(tmp_path / "sparse", verdict)
    whole = verify(tmp_path / "sparse", pattern="2:4", coverage="all")
    assert {fault.rule for fault in whole.faults} == {"unread-weight"}
    assert len(whole.faults) == len(verdict.unread)


@pytest.mark.parametrize("config", [DYNAMIC, GPT_NEO, MPT], ids=["dynamic", "gpt_neo", "mpt"])
def test_verbs_without_a_forward_need_no_trace(tmp_path, config):
    """The whole way by weights alone, also of a model that cannot be traced."""
    torch.manual_seed(0)
    model = Causal.from_config(config)
    said = pruned(tmp_path, model)
    linears = {
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and {"layers", "h", "blocks"} & set(path.split("."))
    }
    assert {site["name"] for site in said["sites"]} == linears
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4)
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert verify(tmp_path / "merged", pattern="2:4", coverage="all").ok
    (tmp_path / "merged" / "sparsity.lock.json").unlink()
    must("lock", tmp_path / "merged", "--pattern", "2:4")
    seen = inspect(tmp_path / "merged")
    assert sum(view.matched for view in seen.sites) == len(linears)


def test_a_model_of_no_known_task_is_known_by_its_modules_which_is_said_once(tmp_path):
    model = BertForMultipleChoice(BERT)
    model.save_pretrained(tmp_path / "dense")
    result = must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    assert "BertForMultipleChoice is of none of the tasks that are known" in one_line(result.err)
    assert must("prune", tmp_path / "dense", "-o", tmp_path / "quiet", "-q").err == ""
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4)
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert verify(tmp_path / "merged", pattern="2:4").ok


def test_inject_leaves_out_what_it_cannot_adapt_and_says_so(tmp_path):
    said = pruned(tmp_path, Causal.from_config(QWEN2_MOE))
    assert not any("shared_expert_gate" in site["name"] for site in said["sites"])
    done = must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--json").json
    assert "gate" in done["refused"]["model.layers.0.mlp.shared_expert_gate.weight"]
    names = ["--targets", "q_proj,shared_expert_gate"]
    must("prune", tmp_path / "dense", "-o", tmp_path / "named", *names)
    done = must("inject", tmp_path / "named", "-o", tmp_path / "narrow", *names, "--json").json
    assert {site["name"].split(".")[-2] for site in done["sites"]} == {"q_proj"}
    assert "rank 16" in done["refused"]["model.layers.0.mlp.shared_expert_gate.weight"]


@pytest.mark.parametrize(("rank", "sites"), [(32, 10), (64, 4)])
def test_a_rank_that_fits_some_sites_adapts_those(world, rank, sites):
    done = must("inject", world / "sparse", "-o", world / "wide", "--rank", rank, "--json").json
    assert len(done["sites"]) == sites
    reasons = [reason for reason in done["refused"].values() if f"rank {rank}" in reason]
    assert len(reasons) == 14 - sites
    assert must("merge", world / "wide", "-o", world / "whole", "--verify-sparsity").code == 0


def test_a_rank_that_fits_no_site_is_an_error(world):
    result = command("inject", world / "sparse", "-o", world / "none", "--rank", 7)
    assert result.code == 2
    assert "ranks that fit all matched sites" in one_line(result.err)


@pytest.mark.parametrize("skip", ["q_proj", "*self_attn.q_proj*", "self_attn.q_proj"])
def test_inject_skips_the_sites_that_are_named(world, skip):
    done = must("inject", world / "sparse", "-o", world / "less", "--rank", 4, "--skip", skip, "--json").json
    assert len(done["sites"]) == 12
    assert done["refused"][Q] == "is excluded by --skip"
    trained = load_file(world / "less" / "adapter_model.safetensors")
    assert not any("q_proj" in name for name in trained)


def test_a_name_to_skip_that_fits_nothing_is_an_error(world):
    result = command("inject", world / "sparse", "-o", world / "less", "--rank", 4, "--skip", "qproj")
    assert result.code == 2
    assert "'qproj' names no site" in one_line(result.err)


@pytest.mark.parametrize(
    ("words", "sites"),
    [
        (["--targets", "q_proj,lm_head"], 1),
        (["--targets", "q_proj,v_proj", "--skip", "v_proj"], 1),
        (["--skip", "lm_head"], 7),
    ],
)
def test_targets_that_cannot_be_taken_are_left_out_with_their_reason(tmp_path, words, sites):
    pruned(tmp_path, make_model("llama-tied", one_layer=True))
    done = must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4, *words, "--json").json
    assert len(done["sites"]) == sites
    assert "tied to the embedding" in done["refused"]["lm_head.weight"] or "--skip" in words


def test_a_file_is_judged_by_itself_whatever_lies_beside_it(tmp_path):
    pruned(tmp_path, make_model("llama-tied", one_layer=True))
    folder = tmp_path / "sparse"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save(folder / "b.safetensors", {"other.weight": sparse(8, 16)})
    (folder / "sparsity.lock.json").unlink()
    verdict = verify(folder / "a.safetensors", pattern="2:4", coverage="all")
    assert verdict.ok
    assert len(verdict.sites) == 7


QUANTIZED = {
    "gptq": {
        "qweight": torch.ones(4, 32, dtype=torch.int32),
        "scales": torch.ones(1, 32),
        "qzeros": torch.ones(1, 4),
    },
    "bitsandbytes": {
        "weight": torch.ones(512, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(16),
        "weight.quant_map": torch.ones(16),
    },
    "packed": {"weight_packed": torch.ones(32, 4, dtype=torch.int32), "weight_scale": torch.ones(32, 1)},
}


def quantize(folder: Path, form: str) -> None:
    """Store every linear of the decoder layers in parts."""

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in [name for name in values if "_proj" in name]:
            del values[name]
            module = name.removesuffix(".weight")
            values.update({f"{module}.{part}": tensor.clone() for part, tensor in QUANTIZED[form].items()})

    rewrite(folder / "model.safetensors", change)
    (folder / "sparsity.lock.json").unlink(missing_ok=True)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("verb", ["prune", "inject", "lock"])
def test_weights_in_a_quantised_form_are_not_called_dense(world, form, verb):
    quantize(world / "sparse", form)
    result = command(verb, world / "sparse", *([] if verb == "lock" else ["-o", world / "out"]))
    assert result.code != 0
    assert "quantised" in one_line(result.err)
    assert "dense" not in result.err
    assert not (world / "out").exists()


def test_verify_says_that_quantised_weights_cannot_be_looked_at(world):
    quantize(world / "sparse", "gptq")
    result = command("verify", world / "sparse", "--pattern", "2:4")
    assert result.code == 1
    assert "quantised" in result.out
    assert "missing" not in result.out


@pytest.mark.parametrize("verb", ["prune", "inject", "lock", "verify"])
def test_the_placeholders_of_a_sharded_run_are_called_so(world, verb):
    def hollow(values: dict[str, torch.Tensor]) -> None:
        values.update({name: torch.zeros(0) for name in values if "_proj" in name})

    rewrite(world / "sparse" / "model.safetensors", hollow)
    (world / "sparse" / "sparsity.lock.json").unlink()
    options = {"lock": [], "verify": ["--pattern", "2:4"]}.get(verb, ["-o", world / "out"])
    result = command(verb, world / "sparse", *options)
    assert result.code != 0
    assert "ZeRO-3" in result.out + result.err
    assert "dense; prune" not in result.err


def remote(folder: Path, marker: Path) -> None:
    """Give a model folder code of its own, which leaves a mark where it runs."""
    (folder / "modeling_own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("words", [["verify", "--pattern", "2:4"], ["inspect"], ["lock", "--force"]])
def test_nothing_runs_a_folders_code_whatever_stands_on_stdin(world, words, tmp_path, monkeypatch):
    remote(world / "sparse", tmp_path / "ran")
    verb, *options = words
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    result = command(verb, world / "sparse", *options)
    assert result.code != 0
    assert not (tmp_path / "ran").exists()
    assert "--trust-remote-code" in one_line(result.err)


def test_a_model_with_code_of_its_own_is_verified_where_it_is_trusted(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    remote(shallow / "sparse", tmp_path / "ran")
    assert command("verify", shallow / "sparse").code == 0, "its lock needs no code"
    assert not (tmp_path / "ran").exists()
    result = must("verify", shallow / "sparse", "--pattern", "2:4", "--trust-remote-code")
    assert "all 7 sites hold 2:4" in result.out
    assert (tmp_path / "ran").exists()
