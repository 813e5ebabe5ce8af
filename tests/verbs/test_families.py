"""prune -> inject -> merge -> verify on disk, for every way in which a family stores its weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, XLNetConfig

from spp_fx.cli import run
from spp_fx.errors import UsageError
from spp_fx.graph.task import positions_of
from spp_fx.verbs.load import fit_length, load_program
from tests.command import must, save_tokenizer
from tests.effort import nightly
from tests.families import FAMILIES, MULTIMODAL, batch, make_model

# Stored (in, out): groups run along the first dimension of the stored tensor.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc"), "gpt-oss": ("experts.gate_up_proj", "experts.down_proj")}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def way(folder: Path, pattern: str) -> None:
    for line in (
        ["prune", folder / "dense", "-o", folder / "sparse", "--pattern", pattern],
        ["inject", folder / "sparse", "-o", folder / "adapter", "--rank", 4],
    ):
        assert run([*map(str, line), "-q"]) == 0
    path = folder / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in load_file(path).items()
    }
    save_file(factors, path)
    for line in (["merge", folder / "adapter", "-o", folder / "merged"], ["verify", folder / "merged"]):
        assert run([*map(str, line), "-q"]) == 0


def check(folder: Path, family: str, group: int | None, kept: int) -> None:
    before, after = stored(folder / "sparse"), stored(folder / "merged")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) >= 4
    for name in changed:
        assert torch.equal(before[name] != 0, after[name] != 0)
        canonical = after[name]
        if any(word in name for word in TRANSPOSED.get(family, ())):
            canonical = canonical.transpose(-1, -2)
        if group is None:
            assert float((canonical == 0).float().mean()) >= 0.499
        else:
            assert int((canonical.reshape(-1, group) != 0).sum(1).max()) <= kept
    ids = batch()
    model = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    program = load_program(folder / "adapter").program.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, program(ids).logits, rtol=1e-4, atol=1e-4)


# Biases beside linears are gpt2's, too.
@pytest.mark.parametrize(
    "family", [nightly(each) if each in ("qwen2", "falcon") else each for each in FAMILIES]
)
def test_2_4_the_whole_way(tmp_path, family):
    make_model(family, one_layer=True).save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    way(tmp_path, "2:4")
    check(tmp_path, family, 4, 2)


@pytest.mark.parametrize(("pattern", "group", "kept"), [("4:8", 8, 4), ("1:4", 4, 1), ("50%", None, 0)])
def test_other_patterns_the_whole_way(tmp_path, pattern, group, kept):
    make_model("llama", one_layer=True).save_pretrained(tmp_path / "dense")
    way(tmp_path, pattern)
    check(tmp_path, "llama", group, kept)


def test_names_without_the_models_prefix(tmp_path):
    make_model("gpt2", one_layer=True).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    way(tmp_path, "2:4")
    check(tmp_path, "gpt2", 4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folds_to_half_a_unit_in_the_last_place(tmp_path, dtype):
    make_model("llama", dtype=dtype, one_layer=True).save_pretrained(tmp_path / "dense")
    way(tmp_path, "2:4")
    base, merged = stored(tmp_path / "sparse"), stored(tmp_path / "merged")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in [n.removesuffix(".spp_beta") for n in factors if n.endswith(".spp_beta")]:
        w = base[name].double()
        alpha, beta = factors[f"{name}.spp_alpha"].double(), factors[f"{name}.spp_beta"].double()
        exact = w * (1 + 2.0 * beta * alpha.repeat_interleave(w.shape[0] // 4, dim=0))
        value = merged[name]
        assert value.dtype is dtype
        half = (
            torch.nextafter(value.abs(), torch.full_like(value, torch.inf)).double() - value.abs().double()
        ) / 2
        kept = (value.abs() == torch.finfo(dtype).tiny) & (exact.abs() < torch.finfo(dtype).tiny)
        assert bool((((value.double() - exact).abs() <= half) | kept).all())


def test_same_input_same_bytes(tmp_path):
    make_model("llama", one_layer=True).save_pretrained(tmp_path / "dense")
    way(tmp_path, "2:4")
    first = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    shutil.rmtree(tmp_path / "merged")
    assert run(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "-q"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == first


def test_a_model_that_sees_images_is_calibrated_trained_and_evaluated_on_text(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MULTIMODAL["gemma3"]()).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("\n".join("a b c d e f g h i j" for _ in range(60)))
    looked = ("--method", "wanda", "--calib", text, "--samples", 4)
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", *looked, "--targets", "q_proj,down_proj")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4)
    trained = must(
        "train", tmp_path / "adapter", "--data", text, "--steps", 1, "--no-lr-trials", "--json"
    ).json
    assert trained["loss"] == pytest.approx(4.56, abs=0.2)  # log of 96 tokens
    evaluated = must("eval", tmp_path / "adapter", "--data", text, "--json").json
    assert evaluated["seq_len"] == 48
    assert 1 < evaluated["perplexity"] < 200


@pytest.mark.parametrize(("config", "most"), [(BloomConfig, None), (GPT2Config, 64), (XLNetConfig, None)])
def test_windows_are_as_long_as_asked_where_a_model_says_no_number_of_positions(config, most):
    model = make_model("llama")
    model.config = config() if most is None else config(n_positions=most)
    positions = positions_of(model)
    assert positions == most
    assert fit_length(positions, None) == (most or 512)
    assert fit_length(positions, 64) == 64
    if most is None:
        assert fit_length(positions, 9000) == 9000
        return
    with pytest.raises(UsageError, match="--seq-len 65 is more than the model's 64 positions"):
        fit_length(positions, 65)
