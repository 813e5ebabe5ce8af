"""`spp-fx reconstruct`: closer to the dense model, layer by layer, every mask as it was, and nothing done is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from spp_fx.graph.trace import trace
from spp_fx.verbs import reconstruct as workflow
from spp_fx.verbs.load import draw_samples, draw_windows
from spp_fx.verbs.settings import Calibration
from tests import tasks
from tests.command import command, listing, must
from tests.effort import nightly
from tests.verbs.conftest import save_with_tokenizer

TEXT = ("--samples", 8, "--seq-len", 32, "--batch-size", 2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def words(world: Path, text: Path, out: Path, *more: object) -> tuple[object, ...]:
    teacher = ("--teacher", world / "dense", "--calib", text, *TEXT)
    return ("reconstruct", world / "sparse", "-o", out, *teacher, *more)


WAYS = {
    "admm": ("--method", "admm"),
    "kept weights": ("--epochs", 3),
    "norms too": ("--epochs", 3, "--train-norms"),
    "dense inputs": ("--epochs", 3, "--inputs", "dense"),
    "spp": ("--method", "spp", "--rank", 4, "--epochs", 3),
    "hira": ("--method", "hira", "--rank", 4, "--epochs", 3),
    "sqft": ("--method", "sqft", "--rank", 4, "--epochs", 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_come_closer_and_masks_stay(pristine, text_file, tmp_path, way):
    result = must(*words(pristine, text_file, tmp_path / "out", *WAYS[way]), "--json").json
    assert [each["layer"] for each in result["layers"]] == ["model.layers.0", "model.layers.1"]
    assert all(each["changed"] for each in result["layers"])
    for each in result["layers"]:
        assert 0 < each["error_after"] < each["error_before"]
    before, after = weights(pristine / "sparse"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    norms = {name for name in before if "layers." in name and before[name].ndim == 1}
    assert set(result["trained"]) == (norms if way == "norms too" else set())
    for name, tensor in before.items():
        if name in result["sites"]:
            assert torch.equal(tensor != 0, after[name] != 0)
            assert not torch.equal(tensor, after[name])
        elif name in result["trained"]:
            assert not torch.equal(tensor, after[name])
        else:
            assert torch.equal(tensor, after[name])
    locks = [
        json.loads((folder / "sparsity.lock.json").read_text())
        for folder in (pristine / "sparse", tmp_path / "out")
    ]
    assert locks[0] == locks[1]
    assert must("verify", tmp_path / "out", "--against", pristine / "sparse", "--json").json["ok"]
    history = json.loads((tmp_path / "out" / "sparsity.provenance.json").read_text())["steps"]
    assert [step["step"] for step in history] == ["prune", "reconstruct"]
    assert history[-1]["inputs"].keys() == {"model", "teacher", "calibration"}


@torch.no_grad()
def test_the_errors_are_those_of_the_models_layers(pristine, text_file, tmp_path):
    """By definition: outputs of a layer of the written model and of the dense one, over all windows."""
    result = must(*words(pristine, text_file, tmp_path / "out", "--epochs", 2), "--json").json
    ids = calibration_of(pristine, text_file)
    states = [
        AutoModelForCausalLM.from_pretrained(folder).eval()(ids, output_hidden_states=True).hidden_states
        for folder in (pristine / "dense", tmp_path / "out")
    ]
    # The last hidden state has gone through the norm.
    expected = float((states[0][1] - states[1][1]).square().sum() / states[0][1].square().sum())
    assert result["layers"][0]["error_after"] == pytest.approx(expected, rel=1e-4)


def calibration_of(world: Path, text: Path) -> torch.Tensor:
    return draw_windows(world / "sparse", trace(world / "sparse"), Calibration(text, 8, 32)).tokens


def test_dense_inputs_are_those_of_the_dense_model(pristine, text_file, tmp_path):
    """The second layer's error before is then that of the pruned layer alone."""
    found = [
        must(*words(pristine, text_file, tmp_path / way, "--inputs", way, "--epochs", 2), "--json").json
        for way in ("dense", "reconstructed")
    ]
    first, second = zip(*(each["layers"] for each in found), strict=True)
    assert first[0] == first[1]
    ids = calibration_of(pristine, text_file)
    with torch.no_grad():
        dense, sparse = (
            AutoModelForCausalLM.from_pretrained(pristine / name).eval() for name in ("dense", "sparse")
        )
        sparse.model.layers[0].load_state_dict(dense.model.layers[0].state_dict())
        layers = [each.model.layers[1] for each in (dense, sparse)]
        made: list[torch.Tensor] = []
        for layer in layers:
            layer.register_forward_hook(lambda _, __, made_now: made.append(made_now))
        dense(ids)
        sparse(ids)
    expected = float((made[0] - made[1]).square().sum() / made[0].square().sum())
    assert second[0]["error_before"] == pytest.approx(expected, rel=1e-4)
    assert second[1]["error_before"] != pytest.approx(expected, rel=1e-2)


def test_a_layer_that_would_come_no_closer_keeps_its_weights(pristine, text_file, tmp_path):
    ran = must(*words(pristine, text_file, tmp_path / "out", "--lr", 3, "--epochs", 1, "--train-norms"))
    assert "layers that are as they were, since they would come no closer: model.layers.0" in ran.out
    before, after = weights(pristine / "sparse"), weights(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", nightly("gpt-oss")])
@pytest.mark.parametrize("method", ["admm", "masked-full"])
def test_conv1d_and_experts_in_half_precision(tmp_path, text_file, family, method, dtype):
    """Stacks, weights stored (in, out), and a file for each expert."""
    save_with_tokenizer(tmp_path / "dense32", text_file, family, max_shard_size="40KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense32", dtype=dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "dense32" / name, tmp_path / "dense" / name)
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    out = tmp_path / "out"
    result = must(*words(tmp_path, text_file, out, "--method", method, "--epochs", 2), "--json").json
    assert all(each["error_after"] < each["error_before"] for each in result["layers"])
    before, after = weights(tmp_path / "sparse"), weights(out)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor != 0, after[name] != 0)
    assert must("verify", out, "--against", tmp_path / "sparse", "--pattern", "2:4", "--json").json["ok"]


@pytest.mark.parametrize("task", ["seq2seq-lm", nightly("image-classification"), nightly("masked-lm")])
def test_other_tasks_are_reconstructed_on_their_own_data(tmp_path, task):
    dense = tmp_path / "dense"
    dense.mkdir()
    tasks.save(task, dense)
    data = tasks.write(task, dense / "data.jsonl")
    must("prune", dense, "-o", tmp_path / "sparse", "-q")
    options = ("--teacher", dense, "--calib", data, "--samples", 2, "--epochs", 4)
    result = must("reconstruct", tmp_path / "sparse", "-o", tmp_path / "out", *options, "--json").json
    assert sum(each["error_after"] for each in result["layers"]) < sum(
        each["error_before"] for each in result["layers"]
    )
    assert must("verify", tmp_path / "out", "--against", tmp_path / "sparse", "--json").json["ok"]


@torch.no_grad()
def test_the_error_of_an_encoders_last_layer_is_that_of_what_the_decoder_reads(tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    tasks.save("seq2seq-lm", dense)
    data = tasks.write("seq2seq-lm", dense / "data.jsonl")
    must("prune", dense, "-o", tmp_path / "sparse", "-q")
    result = must(
        "reconstruct", tmp_path / "sparse", "-o", tmp_path / "out", "--teacher", dense, "--calib", data,
        "--samples", 2, "--json",
    ).json  # fmt: skip
    samples, _ = draw_samples(dense, trace(dense), Calibration(data, 2))
    encoders = [AutoModelForSeq2SeqLM.from_pretrained(f).get_encoder() for f in (dense, tmp_path / "out")]
    lost = energy = 0.0
    for sample in samples:
        given = {name: sample[name] for name in ("input_ids", "attention_mask") if name in sample}
        wanted, made = (each(**given).last_hidden_state for each in encoders)
        lost += float((wanted - made).square().sum())
        energy += float(wanted.square().sum())
    last = [each for each in result["layers"] if each["layer"].startswith("encoder")][-1]
    assert last["error_after"] == pytest.approx(lost / energy, rel=1e-4)


@torch.no_grad()
def test_outputs_that_are_the_dense_models_anyway_do_not_count(tmp_path):
    """T5's first layer makes the table of distances as well, which the others read."""
    dense = tmp_path / "dense"
    dense.mkdir()
    config = tasks.t5()
    config.num_layers = 2
    torch.manual_seed(0)
    tasks.save("seq2seq-lm", dense)
    T5ForConditionalGeneration(config).save_pretrained(dense)
    data = tasks.write("seq2seq-lm", dense / "data.jsonl")
    must("prune", dense, "-o", tmp_path / "sparse", "-q")
    result = must(
        "reconstruct", tmp_path / "sparse", "-o", tmp_path / "out", "--teacher", dense, "--calib", data,
        "--samples", 2, "--json",
    ).json  # fmt: skip
    samples, _ = draw_samples(dense, trace(dense), Calibration(data, 2))
    encoders = [AutoModelForSeq2SeqLM.from_pretrained(f).get_encoder() for f in (dense, tmp_path / "sparse")]
    lost = energy = 0.0
    for sample in samples:
        given = {name: sample[name] for name in ("input_ids", "attention_mask") if name in sample}
        wanted, made = (each(**given, output_hidden_states=True).hidden_states[1] for each in encoders)
        lost += float((wanted - made).square().sum())
        energy += float(wanted.square().sum())
    assert result["layers"][0]["layer"] == "encoder.block.0"
    assert result["layers"][0]["error_before"] == pytest.approx(lost / energy, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["admm", "masked-full"])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(pristine, text_file, tmp_path, method):
    """SIGKILL at the end of the first layer."""
    out, options = tmp_path / "out", ("--method", method, "--epochs", 2, "-q")
    must(*words(pristine, text_file, tmp_path / "whole", *options))
    killed = (
        "import os, signal, sys; from spp_fx.verbs.layers import LayerStore; from spp_fx.cli import run\n"
        "finish = LayerStore.finish\n"
        "def finish_one(self, *arguments):\n"
        "    finish(self, *arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "LayerStore.finish = finish_one\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", killed, *map(str, words(pristine, text_file, out, *options))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    calls = []
    real = workflow.reconstruct_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            workflow, "reconstruct_layers", lambda *a, **k: (calls.append(k["start"]), real(*a, **k))
        )
        must(*words(pristine, text_file, out, *options))
    assert calls == [1]
    assert listing(out) == listing(tmp_path / "whole")


def moved_zero(world: Path, tmp_path: Path) -> Path:
    """The sparse model with one zero filled in, and its old lock."""
    folder = tmp_path / "moved"
    shutil.copytree(world / "sparse", folder)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name := next((n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight")), None):
            row = tensors[name][0]
            row[int((row == 0).nonzero()[0])] = 1.0
            save_file(tensors, file, {"format": "pt"})
    return folder


def other_rope(world: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "rope"
    shutil.copytree(world / "dense", folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


REFUSED = {
    "the model itself": (lambda w, t: (w / "sparse", w / "sparse"), (), 2, "is as sparse as"),
    "no pattern": (lambda w, t: (w / "dense", w / "dense"), (), 1, "is dense"),
    "another method": (lambda w, t: (w / "sparse", w / "dense"), ("--method", "adm"), 2, "did you mean admm"),
    "its option": (
        lambda w, t: (w / "sparse", w / "dense"), ("--method", "admm", "--rank", 4), 2, "rank",
    ),
    "a dropout": (
        lambda w, t: (w / "sparse", w / "dense"), ("--method", "spp", "--dropout", 0.1), 2, "without dropout",
    ),
    "a rate of none": (lambda w, t: (w / "sparse", w / "dense"), ("--method", "admm", "--lr", 1), 2, "--lr"),
    "another rope": (lambda w, t: (w / "sparse", other_rope(w, t)), (), 2, "its rope_parameters is"),
    "a moved zero": (lambda w, t: (moved_zero(w, t), w / "dense"), (), 1, "up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(pristine, text_file, tmp_path, case):
    which, options, code, said = REFUSED[case]
    model, teacher = which(pristine, tmp_path)
    out = tmp_path / "out"
    ended = command(
        "reconstruct", model, "--teacher", teacher, "-o", out, "--calib", text_file, *TEXT, *options
    )
    assert ended.code == code, ended
    assert said in ended.err
    assert not out.exists()


def test_a_teacher_of_other_shapes_is_refused(pristine, text_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pristine / "dense", other)
    config = json.loads((other / "config.json").read_text())
    config["intermediate_size"] += 32
    model = AutoModelForCausalLM.from_config(
        type(AutoModelForCausalLM.from_pretrained(other).config)(**config)
    )
    for file in other.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(other)
    ended = command(
        "reconstruct",
        pristine / "sparse",
        "--teacher",
        other,
        "-o",
        tmp_path / "out",
        "--calib",
        text_file,
        *TEXT,
    )
    assert ended.code == 2
    assert "has shape" in ended.err
    assert "must be the dense model" in ended.err
