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
from tests.command import must, tensors
from tests.effort import covering
from tests.verbs.conftest import save_with_tokenizer

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "spp": {"rank": 4},
    "sqft": {"rank": 2},
    "lors": {"rank": 2},
    "hira": {"rank": 2},
    "masked-full": {},
    "scale-lora": {"rank": 2},
    "grouped": {"gain": 0.5, "width": 2},
}


FAMILIES = ["llama", "mixtral"]  # linears only, and stacks of experts


@pytest.fixture(scope="module")
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def sparse(family, tmp_path_factory, text_file) -> Path:
    root = tmp_path_factory.mktemp(family)
    save_with_tokenizer(root / "dense", text_file, family)
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
WAYS = {"dense": "", "packed": "--packed", "checkpointed": "--packed --gradient-checkpointing"}


@covering(1, indirect=("family", "method"), family=FAMILIES, method=OPTIONS, way=WAYS)
def test_a_method_trains_merges_and_verifies(sparse, folder, method, way, text_file, tmp_path):
    start = tensors(folder)
    adapter = tmp_path / "adapter"
    shutil.copytree(folder, adapter)
    line = ["train", adapter, "--data", text_file, *LINE.split(), *WAYS[way].split()]
    trained_perplexity = must(*line, "--eval-data", text_file, "--json").json["perplexity"]
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
    measure = ("--data", text_file, "--seq-len", 16, "--json", "-q")
    perplexity = must("eval", tmp_path / "merged", *measure).json["perplexity"]
    assert must("eval", adapter, *measure).json["perplexity"] == perplexity
    assert trained_perplexity == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.slow
@covering(1, indirect=("family", "method"), family=FAMILIES, method=OPTIONS)
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
