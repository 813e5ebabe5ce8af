"""`spp-fx inject --init`: what it writes, what it refuses, and what training starts from."""

import json

import pytest
import torch

from tests.command import command, listing, must, one_line, tensors
from tests.verbs.conftest import save_with_tokenizer

TEXT = ("--samples", 8, "--seq-len", 32)


def facts(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    history = json.loads((folder / "sparsity.provenance.json").read_text())["steps"][-1]
    return config, history


def test_a_gradient_start_keeps_the_weights_and_is_recorded(pristine, text_file, tmp_path):
    inject = ("inject", pristine / "sparse", "--rank", 4, "-q")
    must(*inject, "-o", tmp_path / "default")
    for name in ("one", "two"):
        must(*inject, "-o", tmp_path / name, "--init", "gradient", "--calib", text_file, *TEXT)
    assert listing(tmp_path / "one").keys() == listing(tmp_path / "default").keys()
    ours, plain = tensors(tmp_path / "one"), tensors(tmp_path / "default")
    for key, value in tensors(tmp_path / "two").items():
        assert torch.equal(value, ours[key])
        if key.endswith("beta"):
            assert not value.any()
        else:
            assert not torch.equal(value, plain[key])
            torch.testing.assert_close(value.square().mean(), plain[key].square().mean(), rtol=1e-4, atol=0)
    config, step = facts(tmp_path / "one")
    assert config["init"] == step["settings"]["init"] == "gradient"
    assert (step["settings"]["samples"], step["settings"]["seq_len"]) == (8, 32)
    assert step["inputs"].keys() == {"model", "calibration"}
    config, step = facts(tmp_path / "default")
    assert "init" not in config
    assert "init" not in step["settings"]
    must("merge", tmp_path / "one", "-o", tmp_path / "merged", "-q")
    merged = tensors(tmp_path / "merged")
    assert all(torch.equal(value, merged[name]) for name, value in tensors(pristine / "sparse").items())


def test_another_seed_draws_another_text_and_a_teacher_is_recorded(pristine, text_file, tmp_path):
    inject = ("inject", pristine / "sparse", "--rank", 4, "--init", "gradient", "--calib", text_file, *TEXT)
    must(*inject, "-o", tmp_path / "taught", "--teacher", pristine / "dense", "--seed", 1)
    must(*inject, "-o", tmp_path / "text", "--seed", 1)
    _, taught = facts(tmp_path / "taught")
    _, text = facts(tmp_path / "text")
    assert taught["inputs"].keys() == {"model", "calibration", "teacher"}
    assert taught["inputs"]["calibration"] == text["inputs"]["calibration"]
    key = "model.layers.0.mlp.up_proj.weight.spp_alpha"
    assert not torch.equal(tensors(tmp_path / "taught")[key], tensors(tmp_path / "text")[key])


def test_every_expert_has_a_start_of_its_own(text_file, tmp_path):
    save_with_tokenizer(tmp_path / "dense", text_file, "mixtral", one_layer=True)
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    inject = ("inject", tmp_path / "sparse", "--rank", 4, "-q")
    must(*inject, "-o", tmp_path / "adapter", "--init", "gradient", "--calib", text_file, *TEXT)
    alphas = {key: value for key, value in tensors(tmp_path / "adapter").items() if key.endswith("alpha")}
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in alphas.values())
    stack = alphas["model.layers.0.mlp.experts.down_proj.spp_alpha"]
    assert len({tuple(part.flatten().tolist()) for part in stack}) == len(stack) == 4


@pytest.mark.parametrize("method", ["spp", "sqft"])
def test_a_reconstruction_is_closer_to_the_dense_model_right_away(pristine, text_file, tmp_path, method):
    start = ("--init", "reconstruct", "--calib", text_file, *TEXT, "--teacher", pristine / "dense")
    result = must(
        "inject", pristine / "sparse", "-o", tmp_path / "adapter", "--method", method, "--rank", 4, *start
    )
    before, after = (float(word.rstrip("%")) for word in result.err.strip().split(": ")[-1].split(" -> "))
    assert 0 < after < before
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "-q")
    must("verify", tmp_path / "merged", "--against", pristine / "sparse")
    model, merged = tensors(pristine / "sparse"), tensors(tmp_path / "merged")
    assert any(not torch.equal(model[name], merged[name]) for name in model)
    config, step = facts(tmp_path / "adapter")
    assert config["init"] == step["settings"]["init"] == "reconstruct"
    assert step["inputs"].keys() == {"model", "calibration", "teacher"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--init", "gradient"), "--calib"),
        (("--calib", "TEXT"), "--init gradient"),
        (("--samples", 4), "--samples belongs to --calib"),
        (("--teacher", "DENSE"), "--init"),
        (("--init", "reconstruct", "--calib", "TEXT"), "--teacher MODEL"),
        (
            ("--init", "gradient", "--calib", "TEXT", "--method", "masked-full"),
            "masked-full has only its default",
        ),
        (
            ("--init", "reconstruct", "--calib", "TEXT", "--teacher", "DENSE", "--method", "masked-full"),
            "masked-full",
        ),
        (("--init", "gradient", "--calib", "TEXT", "--teacher", "SPARSE"), "as sparse as"),
        (
            ("--init", "reconstruct", "--calib", "TEXT", "--teacher", "MERGED"),
            "the dense model that was pruned",
        ),
        (("--init", "gradient", "--calib", "TEXT", "--samples", 100000), "too short"),
    ],
)
def test_what_a_start_cannot_be_made_of_is_refused(options, word, made, tmp_path):
    folders = {name.upper(): made / name for name in ("dense", "sparse", "merged")}
    words = [(folders | {"TEXT": made / "text.txt"}).get(option, option) for option in options]
    rank = () if "masked-full" in options else ("--rank", 4)
    result = command("inject", made / "sparse", *rank, *words, "-o", tmp_path / "out")
    assert result.code == 2, result.err
    assert word in one_line(result.err)
    assert not list(tmp_path.iterdir())
