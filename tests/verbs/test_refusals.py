"""What cannot be done is said in one line, with the right exit code, and nothing is left on disk."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import command, listing, one_line, rewrite

Q = "model.layers.0.self_attn.q_proj.weight"


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil(name: str):
    def change(values):
        values[name].view(-1)[3] = float("nan")

    return change


def nothing(world: Path) -> None:
    """Wrong from the start."""


def second_shard(world: Path) -> Path:
    return sorted((world / "sharded").glob("model-*.safetensors"))[1]


def shard(world: Path) -> None:
    """The sparse folder becomes one of two shards, the second of which is missing."""
    folder = world / "sparse"
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = {"metadata": {}, "weight_map": {Q: first, "x": second}}
    (folder / "model.safetensors").rename(folder / first)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TRAIN = "train adapter --data text.txt --steps 1 --seq-len 16 --batch-size 2"
CASES = {
    "prune-onto-existing": (nothing, "prune dense -o sparse", 2, "sparse"),
    "prune-onto-its-input": (nothing, "prune dense -o dense --force", 2, "dense"),
    "prune-unknown-method": (nothing, "prune dense -o new --method best", 2, "magnitude"),
    "prune-bad-pattern": (nothing, "prune dense -o new --pattern 5:4", 2, "5:4"),
    "prune-pattern-no-pattern": (nothing, "prune dense -o new --pattern dense", 2, "dense"),
    "prune-pattern-does-not-divide": (nothing, "prune dense -o new --pattern 2:5", 1, "not a multiple of the group"),
    "prune-unknown-target": (nothing, "prune dense -o new --targets w_proj", 2, "w_proj"),
    "prune-missing-folder": (nothing, "prune nowhere -o new", 2, "nowhere"),
    "prune-not-finite": (
        lambda w: rewrite(w / "dense" / "model.safetensors", spoil(Q)), "prune dense -o new", 1, Q,
    ),
    "prune-truncated": (
        lambda w: truncate(w / "dense" / "model.safetensors"), "prune dense -o new", 1, "model.safetensors",
    ),
    "prune-no-config": (lambda w: (w / "dense" / "config.json").unlink(), "prune dense -o new", 2, "config.json"),
    "prune-broken-config": (
        lambda w: truncate(w / "dense" / "config.json"), "prune dense -o new", 1, "config.json",
    ),
    "inject-onto-existing": (nothing, "inject sparse -o adapter --rank 4", 2, "adapter"),
    "inject-dense": (nothing, "inject dense -o new --rank 4", 1, "prune"),
    "inject-unknown-target": (nothing, "inject sparse -o new --targets w_proj", 2, "w_proj"),
    "inject-rank-does-not-divide": (nothing, "inject sparse -o new --rank 5", 2, "rank 5"),
    "inject-rank-zero": (nothing, "inject sparse -o new --rank 0", 2, "rank"),
    "inject-unknown-method": (nothing, "inject sparse -o new --method best", 2, "spp"),
    "inject-missing-shard": (shard, "inject sparse -o new --rank 4", 1, "model-00002-of-00002.safetensors"),
    "inject-lock-of-another-mask": (
        lambda w: shutil.copy(w / "half" / "sparsity.lock.json", w / "sparse"),
        "inject sparse -o new --rank 4", 1, "sparsity.lock.json",
    ),
    "merge-onto-existing": (nothing, "merge adapter -o merged", 2, "merged"),
    "merge-no-adapter": (nothing, "merge sparse -o new", 2, "adapter_config.json"),
    "merge-wrong-base": (nothing, "merge adapter -o new --base half", 1, "half"),
    "merge-base-changed": (
        lambda w: rewrite(w / "sparse" / "model.safetensors", lambda v: v[Q].mul_(2)),
        "merge adapter -o new", 1, "has changed since 'spp-fx inject'",
    ),
    "merge-base-gone": (lambda w: (w / "sparse").rename(w / "moved"), "merge adapter -o new", 2, "--base"),
    "merge-nan-factor": (
        lambda w: rewrite(w / "adapter" / "adapter_model.safetensors", spoil(f"{Q}.spp_alpha")),
        "merge adapter -o new", 1, f"adapter_model.safetensors: {Q}.spp_alpha holds 1 NaN or infinite values",
    ),
    "merge-infinite-factor": (
        lambda w: rewrite(
            w / "adapter" / "adapter_model.safetensors", lambda v: v[f"{Q}.spp_beta"][2].fill_(float("inf"))
        ),
        "merge adapter -o new", 1, "first at row 2, column 0",
    ),
    "merge-factor-missing": (
        lambda w: rewrite(w / "adapter" / "adapter_model.safetensors", lambda v: v.pop(f"{Q}.spp_beta")),
        "merge adapter -o new", 1, "is missing",
    ),
    "merge-truncated-factors": (
        lambda w: truncate(w / "adapter" / "adapter_model.safetensors"),
        "merge adapter -o new", 1, "adapter_model.safetensors",
    ),
    "merge-broken-adapter-config": (
        lambda w: truncate(w / "adapter" / "adapter_config.json"),
        "merge adapter -o new", 1, "adapter_config.json",
    ),
    "merge-adapter-config-of-the-future": (
        lambda w: edit(w / "adapter" / "adapter_config.json", format_version=2),
        "merge adapter -o new", 1, "format_version",
    ),
    "merge-broken-lock": (
        lambda w: truncate(w / "adapter" / "sparsity.lock.json"), "merge adapter -o new", 1, "sparsity.lock.json",
    ),
    "verify-nothing-to-hold-it-to": (nothing, "verify dense", 2, "--pattern"),
    "verify-no-artifact": (nothing, "verify text.txt", 2, "text.txt"),
    "verify-missing": (nothing, "verify nowhere", 2, "nowhere"),
    "verify-lock-missing": (nothing, "verify sparse --lock nowhere.json", 2, "nowhere.json"),
    "verify-truncated": (
        lambda w: truncate(w / "sparse" / "model.safetensors", 0.9), "verify sparse", 1, "model.safetensors",
    ),
    "verify-header-cut": (
        lambda w: truncate(w / "sparse" / "model.safetensors", 0.001), "verify sparse", 1, "model.safetensors",
    ),
    "verify-missing-shard": (shard, "verify sparse", 1, "model-00002-of-00002.safetensors"),
    "verify-lost-shard": (lambda w: second_shard(w).unlink(), "verify sharded", 1, "model-00002-of-"),
    "verify-cut-shard": (lambda w: truncate(second_shard(w), 0.99), "verify sharded", 1, "model-00002-of-"),
    "export-lost-shard": (
        lambda w: second_shard(w).unlink(), "export sharded -o new --format safetensors", 1, "model-00002-of-",
    ),
    "verify-broken-lock": (
        lambda w: truncate(w / "sparse" / "sparsity.lock.json"), "verify sparse", 1, "sparsity.lock.json",
    ),
    "verify-broken-manifest": (
        lambda w: truncate(w / "packed" / "export.json"), "verify packed", 1, "export.json",
    ),
    "verify-nan-in-an-adapter": (
        lambda w: rewrite(w / "adapter" / "adapter_model.safetensors", spoil(f"{Q}.spp_beta")),
        "verify adapter", 1, Q,
    ),
    "export-onto-existing": (nothing, "export merged -o packed --format cusparselt", 2, "packed"),
    "export-dense": (nothing, "export dense -o new --format cusparselt", 2, "dense"),
    "export-what-does-not-verify": (
        lambda w: rewrite(w / "merged" / "model.safetensors", lambda v: v[Q].fill_(1.0)),
        "export merged -o new --format safetensors", 1, Q,
    ),
    "train-no-adapter": (nothing, TRAIN.replace("adapter", "sparse"), 2, "inject"),
    "train-nan-factor": (
        lambda w: rewrite(w / "adapter" / "adapter_model.safetensors", spoil(f"{Q}.spp_alpha")),
        TRAIN, 1, f"{Q}.spp_alpha holds 1 NaN or infinite values, first at row 0, column 3",
    ),
    "train-no-tokenizer": (
        lambda w: [path.unlink() for path in (w / "sparse").glob("tokenizer*")], TRAIN, 2, "tokenizer",
    ),
    "train-text-too-short": (lambda w: (w / "text.txt").write_text("a b c"), TRAIN, 2, "do not fill a window"),
    "train-missing-adapter": (nothing, "train nowhere --data text.txt", 2, "nowhere: there is no such adapter folder"),
    "train-config-missing": (nothing, f"{TRAIN} --config nowhere.yaml", 2, "nowhere.yaml: there is no such file"),
    "train-text-missing": (lambda w: (w / "text.txt").unlink(), TRAIN, 2, "text.txt: there is no such file"),
    "train-text-is-binary": (lambda w: (w / "text.txt").write_bytes(b"\xff\xfe\xfa"), TRAIN, 2, "UTF-8"),
    "train-steps-and-epochs": (nothing, TRAIN + " --epochs 1", 2, "not both"),
    "train-negative-rate": (nothing, TRAIN + " --lr -1", 2, "--lr"),
    "train-nothing-to-resume": (nothing, TRAIN + " --resume", 2, "--save-steps"),
    "eval-text-missing": (nothing, "eval merged --data nowhere.txt", 2, "nowhere.txt: there is no such file"),
    "eval-no-window": (nothing, "eval merged --data text.txt --seq-len 1", 2, "seq-len"),
    "inject-dropout": (nothing, "inject sparse -o new --rank 4 --dropout 1.5", 2, "dropout"),
    "opt-unknown-pass": (nothing, "opt dense -p canonicalize,polish", 2, "polish"),
    "opt-bad-field": (nothing, "opt dense -p canonicalize,match{colour=red}", 2, "colour"),
    "opt-open-brace": (nothing, "opt dense -p canonicalize,match{", 2, "match"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line_with_nothing_written(case, world, monkeypatch):
    arrange, line, code, word = CASES[case]
    arrange(world)
    monkeypatch.chdir(world)
    before = listing(world)
    result = command(*line.split())
    assert result.code == code, result.err
    assert word in one_line(result.err)
    assert result.out == ""
    assert listing(world) == before


def test_a_lock_of_another_model_is_refused(world):
    other = json.loads((world / "sparse" / "sparsity.lock.json").read_text())
    for site in other["sites"]:
        site["name"] = f"other.{site['name']}"
    (world / "other.json").write_text(json.dumps(other))
    result = command("verify", world / "sparse", "--lock", world / "other.json")
    assert result.code == 1
    assert "lock of another model" in one_line(result.err)


@pytest.mark.parametrize(
    "line", ["verify --nonsense", "export merged", "merge --vanish maybe", "train", "bake"]
)
def test_wrong_usage_exits_2(line, world, monkeypatch):
    monkeypatch.chdir(world)
    result = command(*line.split())
    assert result.code == 2
    assert "Traceback" not in result.err
