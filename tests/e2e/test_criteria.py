"""prune, inject, train, merge and verify with every criterion, on a real model."""

import pytest
from safetensors.torch import load_file

from tests.command import must
from tests.real_data import data_folder

pytestmark = pytest.mark.slow

WAYS = {
    "magnitude": (),
    "wanda": ("--method", "wanda"),
    "ria": ("--method", "ria", "--permute"),
    "sparsegpt": ("--method", "sparsegpt"),
    "wanda+dsnot": ("--method", "wanda", "--repair", "dsnot"),
    "wanda+admm": ("--method", "wanda", "--update", "admm"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_of_every_criterion_survives(tmp_path, way):
    data = data_folder()
    train = data / "tinystories" / "train.txt"
    sparse, adapter, merged = (tmp_path / name for name in ("sparse", "adapter", "merged"))
    options = (*WAYS[way], *(("--calib", train, "--samples", 8, "--seq-len", 256) if WAYS[way] else ()))
    must("prune", data / "story-656k", "-o", sparse, "--pattern", "2:4", *options)
    must("inject", sparse, "-o", adapter)
    must("train", adapter, "--data", train, "--steps", 4, "--seq-len", 64, "--batch-size", 4)
    must("merge", adapter, "-o", merged, "--verify-sparsity")
    report = must("verify", merged, "--pattern", "2:4", "--against", sparse, "--json").json
    assert report["ok"]
    assert len(report["sites"]) == 14
    before, after = (load_file(folder / "model.safetensors") for folder in (sparse, merged))
    for site in report["sites"]:
        assert ((before[site["name"]] != 0) == (after[site["name"]] != 0)).all()
        assert not (before[site["name"]] == after[site["name"]]).all()
