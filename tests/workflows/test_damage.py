"""Damage of every kind: one clear line, the right exit code, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import spp_fx


@pytest.fixture
def work(pristine, tmp_path) -> Path:
    """A copy that may be damaged; the adapter finds its base beside itself."""
    shutil.copytree(pristine, tmp_path / "w")
    return tmp_path / "w"


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def edit(folder: Path, name: str, change) -> None:
    """Change one stored tensor of a sharded folder in place."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["sparse", "half"])
@pytest.mark.parametrize("pick", [0, 7, -1])
def test_one_lost_zero_is_named_by_tensor_row_and_column(work, capfd, name, kind, pick):
    where: list[int] = []

    def flip(weight: torch.Tensor) -> None:
        row, column = (weight == 0).nonzero()[pick].tolist()
        where.extend((row, column))
        weight[row, column] = 0.25

    edit(work / kind, name, flip)
    lock = work / kind / "sparsity.lock.json"
    ran = spp_fx(capfd, "verify", work / kind, "--lock", lock)
    assert ran.code == 1
    assert name in ran.out
    assert f"row {where[0]}, column {where[1]}: zero in the lock, non-zero now" in ran.out
    (site,) = [s for s in spp_fx(capfd, "verify", work / kind, "--json").json()["sites"] if not s["ok"]]
    assert (site["name"], site["lost_zeros"], site["new_zeros"], site["mask_equal"]) == (name, 1, 0, False)
    if kind == "sparse":
        assert site["violations"] == 1


def test_one_new_zero_is_named(work, capfd):
    def zero(weight: torch.Tensor) -> None:
        weight[3, int((weight[3] != 0).nonzero()[0])] = 0

    edit(work / "sparse", NAMES[0], zero)
    ran = spp_fx(capfd, "verify", work / "sparse")
    assert ran.code == 1
    assert "row 3, column" in ran.out
    assert "non-zero in the lock, zero now" in ran.out


def test_nan_is_named(work, capfd):
    def spoil(weight: torch.Tensor) -> None:
        row, column = (weight != 0).nonzero()[5].tolist()
        weight[row, column] = float("nan")

    edit(work / "sparse", NAMES[0], spoil)
    ran = spp_fx(capfd, "verify", work / "sparse")
    assert ran.code == 1
    assert "NaN" in ran.out


def missing_shard(work: Path) -> None:
    sorted((work / "sparse").glob("model-*.safetensors"))[1].unlink()


def truncated(work: Path) -> None:
    path = sorted((work / "sparse").glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def other_lock(work: Path) -> None:
    lock = json.loads((work / "sparse" / "sparsity.lock.json").read_text())
    for site in lock["sites"]:
        site["name"] = "other." + site["name"]
    (work / "sparse" / "sparsity.lock.json").write_text(json.dumps(lock))


def broken_lock(work: Path) -> None:
    (work / "sparse" / "sparsity.lock.json").write_text("{")


@pytest.mark.parametrize("damage", [missing_shard, truncated, other_lock, broken_lock])
@pytest.mark.parametrize("verb", ["verify", "inject", "export"])
def test_damaged_models_are_refused_in_one_line(work, capfd, damage, verb):
    damage(work)
    before = listing(work)
    line = {
        "verify": ("verify", work / "sparse"),
        "inject": ("inject", work / "sparse", "-o", work / "new", "--rank", 4),
        "export": ("export", work / "sparse", "-o", work / "new", "--format", "safetensors"),
    }[verb]
    ran = spp_fx(capfd, *line, "-q")
    if damage is other_lock and verb == "inject":
        assert ran.code == 0
        return
    assert ran.code == 1
    assert len(ran.err.strip().splitlines()) == 1
    assert "Traceback" not in ran.err
    assert listing(work) == before


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        (("prune", "dense", "-o", "sparse"), 2, "exists"),
        (("inject", "sparse", "-o", "adapter"), 2, "exists"),
        (("merge", "adapter", "-o", "sparse"), 2, "exists"),
        (("export", "sparse", "--format", "onnx", "-o", "half"), 2, "exists"),
        (("prune", "dense", "-o", "new", "--pattern", "4:2"), 2, "4:2"),
        (("prune", "dense", "-o", "new", "--method", "nothing"), 2, "magnitude"),
        (("prune", "dense", "-o", "new", "--pattern", "2:5"), 1, "multiple of 5"),
        (("prune", "nowhere", "-o", "new"), 2, "nowhere"),
        (("inject", "dense", "-o", "new", "--rank", "4"), 1, "dense"),
        (("inject", "sparse", "-o", "new", "--rank", "7"), 2, "1, 2, 4, 8, 16"),
        (("inject", "sparse", "-o", "new", "--targets", "nothing"), 2, "q_proj"),
        (("inject", "sparse", "-o", "new", "--method", "nothing"), 2, "spp"),
        (("inject", "sparse", "-o", "new", "--dropout", "1.5"), 2, "dropout"),
        (("merge", "sparse", "-o", "new"), 2, "adapter"),
        (("merge", "adapter", "-o", "new", "--base", "half"), 1, "half"),
        (("train", "adapter", "--data", "nowhere.txt"), 2, "nowhere.txt"),
        (("train", "sparse", "--data", "TEXT"), 2, "inject"),
        (("verify", "dense"), 2, "--pattern"),
        (("verify", "dense", "--pattern", "2:4"), 1, ""),
        (("export", "dense", "--format", "safetensors", "-o", "new"), 2, "dense"),
        (("opt", "sparse", "-p", "canonicalize,nothing"), 2, "nothing"),
        (("eval", "sparse", "--data", "TEXT", "--seq-len", "1"), 2, "seq-len"),
    ],
)
def test_wrong_requests_are_refused_and_write_nothing(work, capfd, monkeypatch, text_file, line, code, word):
    monkeypatch.chdir(work)
    before = listing(work)
    ran = spp_fx(capfd, *(text_file if part == "TEXT" else part for part in line), "-q")
    assert ran.code == code
    assert word in ran.err + ran.out
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) <= 1
    assert listing(work) == before


def test_a_base_that_changed_after_inject_is_refused(work, capfd):
    edit(work / "sparse", NAMES[0], lambda weight: weight.mul_(2))
    ran = spp_fx(capfd, "merge", work / "adapter", "--base", work / "sparse", "-o", work / "new", "-q")
    assert ran.code == 1
    assert not (work / "new").exists()


def test_factors_that_are_not_finite_are_refused_with_their_place(work, capfd):
    path = work / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    factors[f"{NAMES[0]}.spp_beta"][2] = float("inf")
    save_file(factors, path)
    ran = spp_fx(capfd, "merge", work / "adapter", "--base", work / "sparse", "-o", work / "new", "-q")
    assert ran.code == 1
    assert NAMES[0] in ran.err
    assert "row 2" in ran.err
    assert not (work / "new").exists()
