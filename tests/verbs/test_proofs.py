"""What a proof must not let through: narrow locks, moved masks, foreign files, half-loaded models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spp_fx.adapters.fold import StoredFold
from spp_fx.sparsity.lock import load_lock
from tests.command import command, must, one_line, randomize, rewrite, tensors

TRAIN = [
    "train",
    "adapter",
    "--data",
    "text.txt",
    "--seq-len",
    "16",
    "--batch-size",
    "2",
    "--no-lr-trials",
    "--steps",
    "4",
    "-q",
]

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def narrow(world) -> Path:
    """A model merged from an adapter of the query projections alone."""
    must("inject", world / "sparse", "-o", world / "part", "--rank", 4, "--targets", "q_proj")
    randomize(world / "part")
    must("merge", world / "part", "-o", world / "narrow")
    return world / "narrow"


def test_a_merge_of_some_sites_keeps_the_lock_of_all(world, narrow):
    names = {entry.name for entry in load_lock(world / "sparse" / "sparsity.lock.json").sites}
    lock = load_lock(narrow / "sparsity.lock.json")
    assert {entry.name for entry in lock.sites} == names
    assert command("verify", narrow).code == 0
    rewrite(narrow / "model.safetensors", lambda values: values[UP].fill_(0.5))
    result = command("verify", narrow)
    assert result.code == 1
    assert UP in result.out


def test_a_merge_holds_the_base_to_all_of_its_lock(world):
    must("inject", world / "sparse", "-o", world / "part", "--rank", 4, "--targets", "q_proj")
    lock = json.loads((world / "sparse" / "sparsity.lock.json").read_text())
    other = json.loads((world / "half" / "sparsity.lock.json").read_text())
    swapped = {site["name"]: site for site in other["sites"]}
    lock["sites"] = [swapped[site["name"]] if site["name"] == UP else site for site in lock["sites"]]
    (world / "sparse" / "sparsity.lock.json").write_text(json.dumps(lock | {"pattern": None}))
    result = command("merge", world / "part", "-o", world / "new", "-q")
    assert result.code == 1
    assert not (world / "new").exists()


@pytest.mark.parametrize("extra", [["--pattern", "2:4"], ["--pattern", "2:4", "--lock"]])
def test_a_pattern_is_asked_of_sites_that_the_lock_leaves_out(world, extra):
    path = world / "sparse" / "sparsity.lock.json"
    lock = json.loads(path.read_text())
    lock["sites"] = [site for site in lock["sites"] if site["name"] == Q]
    path.write_text(json.dumps(lock))
    line = [*extra, path] if extra[-1] == "--lock" else extra
    assert command("verify", world / "sparse", *line).code == 0
    rewrite(world / "sparse" / "model.safetensors", lambda values: values[UP].fill_(0.5))
    result = command("verify", world / "sparse", *line)
    assert result.code == 1
    assert UP in result.out


def test_against_is_asked_of_sites_that_the_lock_leaves_out(world):
    (world / "merged" / "sparsity.lock.json").unlink()
    rewrite(world / "merged" / "model.safetensors", lambda values: values[UP].fill_(0.5))
    result = command("verify", world / "merged", "--against", world / "sparse")
    assert result.code == 1
    assert UP in result.out


@pytest.mark.parametrize("vanish", ["keep", "allow"])
def test_a_moved_mask_is_no_vanished_value(world, monkeypatch, vanish):
    true_fold = StoredFold.rows

    def moved(fold, stored, out, start):
        counts = true_fold(fold, stored, out, start)
        out[:] = out[:, ::-1].copy()
        return counts

    monkeypatch.setattr(StoredFold, "rows", moved)
    result = command("merge", world / "adapter", "-o", world / "new", "--vanish", vanish, "-q")
    assert result.code == 1
    assert "mask is not that of the lock" in one_line(result.err)
    assert not (world / "new").exists()


def test_values_that_vanish_are_allowed_where_that_is_asked_for(world):
    def cancel(values: dict[str, torch.Tensor]) -> None:
        values[f"{Q}.spp_alpha"].fill_(1.0)
        values[f"{Q}.spp_beta"].fill_(-0.5)

    rewrite(world / "adapter" / "adapter_model.safetensors", cancel)
    report = command("merge", world / "adapter", "-o", world / "new", "--vanish", "allow", "--json").json
    (site,) = [site for site in report["sites"] if site["name"] == Q]
    assert site["vanished"] == int((tensors(world / "sparse")[Q] != 0).sum())
    assert not tensors(world / "new")[Q].any()
    must("verify", world / "new")


def test_the_lock_of_another_model_is_no_lock(world):
    path = world / "sparse" / "sparsity.lock.json"
    lock = json.loads(path.read_text())
    for site in lock["sites"]:
        site["name"] = f"other.{site['name']}"
    path.write_text(json.dumps(lock))
    result = command("inject", world / "sparse", "-o", world / "new", "--rank", 4, "-q")
    assert result.code == 1
    assert "lock of another model" in one_line(result.err)
    assert not (world / "new").exists()


@pytest.mark.parametrize("verb", [["prune", "--pattern", "1:4"], ["inject", "--rank", 4]])
def test_a_changed_copy_does_not_take_the_manifest_along(world, verb):
    must("export", world / "merged", "-o", world / "shipped", "--format", "safetensors")
    must(verb[0], world / "shipped", "-o", world / "next", *verb[1:])
    if verb[0] == "inject":
        must("merge", world / "next", "-o", world / "last")
    out = world / ("last" if verb[0] == "inject" else "next")
    assert not (out / "export.json").exists()
    must("verify", out)


def test_one_shard_of_several_is_held_to_its_own_sites(world):
    for shard in sorted((world / "sharded").glob("model-*.safetensors")):
        held = {name for name in load_file(shard) if name.endswith("proj.weight")}
        result = command("verify", shard, "--json")
        if held:
            assert result.code == 0, result.err
            assert {site["name"] for site in result.json["sites"]} == held


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ("model.layers.0.input_layernorm.weight", "eval sparse --data text.txt"),
        ("model.embed_tokens.weight", "train adapter --data text.txt --steps 1 --seq-len 16"),
        ("model.norm.weight", "export sparse --format onnx"),
    ],
)
def test_a_tensor_that_is_missing_is_not_made_up(shallow, monkeypatch, lost, line):
    monkeypatch.chdir(shallow)
    rewrite(shallow / "sparse" / "model.safetensors", lambda values: values.pop(lost))
    must("inject", "sparse", "-o", "again", "--rank", 4)
    result = command(*line.replace("adapter", "again").split(), "-q")
    assert result.code == 1
    assert lost in one_line(result.err)


@pytest.mark.parametrize(
    "line",
    [
        "inject packed -o new",
        "prune packed -o new",
        "inspect packed",
        "merge adapter -o new --base packed",
    ],
)
def test_an_export_is_no_model(world, monkeypatch, line):
    monkeypatch.chdir(world)
    result = command(*line.split(), "-q")
    assert result.code == 2
    assert "is an export (cusparselt)" in one_line(result.err)
    assert not (world / "new").exists()


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_compressed_weights_are_named(world, verb):
    def compress(values: dict[str, torch.Tensor]) -> None:
        values[Q.replace("weight", "compressed")] = values.pop(Q)
        values[Q.replace("weight", "bitmask")] = torch.zeros(4, dtype=torch.uint8)

    rewrite(world / "sparse" / "model.safetensors", compress)
    result = command(verb, world / "sparse", "-q")
    assert result.code == 1
    assert "compressed" in one_line(result.err)
    assert "random" in result.err


def test_a_sparsity_config_is_not_carried_on(world):
    path = world / "sparse" / "config.json"
    settings = {"quantization_config": {"sparsity_config": {"format": "dense"}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    result = command("inject", world / "sparse", "-o", world / "new", "--rank", 4, "-q")
    assert result.code == 1
    assert "sparsity_config" in one_line(result.err)


def test_everything_pruned_is_refused(world):
    result = command("prune", world / "dense", "-o", world / "new", "--pattern", "100%", "-q")
    assert result.code == 2
    assert "no weight" in one_line(result.err)


def test_checkpoints_are_kept_unless_they_are_given_up(shallow, monkeypatch):
    monkeypatch.chdir(shallow)
    must(*TRAIN, "--save-steps", 2)
    (shallow / "adapter" / "checkpoint-best").mkdir()
    result = command(*TRAIN)
    assert result.code == 2
    assert "--resume" in one_line(result.err)
    assert (shallow / "adapter" / "checkpoint-4").is_dir()
    must(*TRAIN, "--force")
    assert sorted(path.name for path in (shallow / "adapter").glob("checkpoint-*")) == ["checkpoint-best"]


@pytest.mark.parametrize("damage", ["optimizer.safetensors", "trainer_state.json"])
def test_resume_takes_the_newest_whole_checkpoint(shallow, monkeypatch, damage):
    monkeypatch.chdir(shallow)
    must(*TRAIN, "--save-steps", 2)
    whole = (shallow / "adapter" / "adapter_model.safetensors").read_bytes()
    path = shallow / "adapter" / "checkpoint-4" / damage
    path.write_bytes(path.read_bytes()[:-100])
    must(*TRAIN, "--save-steps", 2, "--resume")
    assert (shallow / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    shutil.rmtree(shallow / "adapter" / "checkpoint-2")
    path.write_bytes(b"")
    result = command(*TRAIN, "--resume")
    assert result.code == 2
    assert "no complete checkpoint" in one_line(result.err)


def test_an_adapter_is_held_to_the_very_base_that_it_was_made_for(world):
    """The masks of another model may be the same; the adapter's factors are not for it."""
    rewrite(world / "sparse" / "model.safetensors", lambda values: values[Q].mul_(2))
    result = command("verify", world / "adapter", "--json")
    assert result.code == 1
    assert "is not the base model of" in result.json["problems"][0]
