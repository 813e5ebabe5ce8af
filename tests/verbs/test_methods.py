"""Every adapter method end to end: inject, train, merge, verify; one of them is another package's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.adapters.layers import OUTSIDE
from tests.command import must, randomize, tensors
from tests.effort import covering, nightly
from tests.verbs.conftest import save_with_tokenizer

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "spp": {"rank": 4},
    "sqft": {"rank": 2},
    "lors": {"rank": 2},
    "hira": {"rank": 2},
    "masked-full": {},
    "scale-lora": {"rank": 2},
    "lora-star": {"rank": 2, "dropout": 0.0},
    "grouped": {"gain": 0.5, "width": 2},
}


FAMILIES = ["llama", "mixtral", "gpt2"]  # linears only, stacks of experts, transposed weights


@pytest.fixture(scope="module")
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def sparse(family, tmp_path_factory, text_file) -> Path:
    root = tmp_path_factory.mktemp(family)
    save_with_tokenizer(root / "dense", text_file, family, one_layer=True)
    must("prune", root / "dense", "-o", root / "sparse", "-q")
    return root / "sparse"


@pytest.fixture(scope="module")
def folder(sparse, method, tmp_path_factory) -> Path:
    """The folder of an adapter of a method over a sparse model."""
    import spp_fx

    out = tmp_path_factory.mktemp(method) / "adapter"
    spp_fx.inject(sparse, out, method=method, **OPTIONS[method])
    return out


LINE = "--seq-len 16 --steps 4 --lr 0.02 --batch-size 8 -q"
WAYS = {"dense": "", "packed": "--packed --gradient-checkpointing"}


@covering(1, indirect=("family", "method"), family=FAMILIES, method=OPTIONS, way=WAYS)
def test_a_method_trains_merges_and_verifies(sparse, folder, method, way, text_file, tmp_path):
    start = tensors(folder)
    adapter = tmp_path / "adapter"
    shutil.copytree(folder, adapter)
    held = tmp_path / "held.txt"
    held.write_text(text_file.read_text()[:800])
    line = ["train", adapter, "--data", text_file, *LINE.split(), *WAYS[way].split()]
    trained_perplexity = must(*line, "--eval-data", held, "--json").json["perplexity"]
    trained = tensors(adapter)
    assert {name.rpartition(".")[2] for name in trained} == {name.rpartition(".")[2] for name in start}
    assert all(not torch.equal(value, start[name]) for name, value in trained.items())
    report = must("merge", adapter, "-o", tmp_path / "merged", "--verify-sparsity", "--json", "-q").json
    assert report["summary"]["masks_equal"] == len(report["sites"]) > 0
    unchanged = [site["name"] for site in report["sites"] if not site["changed"]]
    assert len(unchanged) < len(report["sites"]) / 2
    assert all(".experts." in name for name in unchanged)  # that no token was routed to
    must("verify", tmp_path / "merged", "--pattern", "2:4", "--against", sparse, "-q")
    must("verify", adapter, "-q")
    measure = ("--data", held, "--seq-len", 16, "--json", "-q")
    perplexity = must("eval", tmp_path / "merged", *measure).json["perplexity"]
    assert must("eval", adapter, *measure).json["perplexity"] == perplexity
    assert trained_perplexity == pytest.approx(perplexity, rel=1e-4)


def test_merge_says_what_the_mask_took_from_a_dense_update(pristine, tmp_path):
    must(
        "inject", pristine / "sparse", "-o", tmp_path / "adapter", "--method", "lora-star", "--rank", 2, "-q"
    )
    randomize(tmp_path / "adapter")
    weights, factors = tensors(pristine / "sparse"), tensors(tmp_path / "adapter")
    done = must("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json").json
    total = torch.zeros(2, dtype=torch.float64)
    for site in done["sites"]:
        a, b = (factors[f"{site['name']}.lora_star_{key}"].double() for key in "ab")
        weight, update = weights[site["name"]], 2 * b @ a
        removed = update[weight == 0]
        assert site["removed"] == removed.numel() == int((weight == 0).sum())
        assert site["removed_share"] == pytest.approx(float(removed.square().sum() / update.square().sum()))
        total += torch.stack([removed.square().sum(), update.square().sum()])
    share = float(total[0] / total[1])
    assert 0.3 < share < 0.7
    assert done["summary"]["removed"] == sum(site["removed"] for site in done["sites"])
    assert done["summary"]["removed_share"] == pytest.approx(share)
    said = must("merge", tmp_path / "adapter", "-o", tmp_path / "again").out
    assert (
        f"the mask removed {done['summary']['removed']:,} entries of the update, {share:.1%} of its" in said
    )


@pytest.mark.slow
# GPT-2 has dropout of its own, which each process draws for itself. The others of a kind run at night.
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mixtral", "spp"),
        ("llama", "lors"),
        ("mixtral", "hira"),
        ("llama", "grouped"),
        *(nightly("llama", method) for method in ("sqft", "masked-full", "scale-lora", "lora-star")),
    ],
    indirect=True,
)
def test_two_processes_train_a_method_as_one_does(folder, method, text_file, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
    words = ["--data", text_file, *LINE.split(), "--logging-steps", "1", "--json"]
    one = must("train", tmp_path / "one", *words).json
    line = [
        sys.executable,
        "-m",
        *["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spp_fx", "train"],
    ]
    result = subprocess.run(
        [*line, tmp_path / "two", *words, "--batch-size", "4"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{OUTSIDE}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    two = json.loads(result.stdout)
    # AdamW turns the rounding of a gradient near zero into a step, so the curves are compared and not the factors.
    assert len(two["losses"]) == 4
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=2e-4, atol=0)
    start = tensors(folder)
    moved = [name for name, value in tensors(tmp_path / "two").items() if not torch.equal(value, start[name])]
    assert len(moved) >= len(start) // 2
