"""Pruning layer by layer from a folder against the plain implementation of each formula, on a real model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.verbs.load import draw_windows
from spp_fx.verbs.prune import prune
from spp_fx.verbs.settings import Calibration
from tests.pruning import plain
from tests.real_data import data_folder

SAMPLES, LENGTH = 16, 128


@pytest.fixture(scope="module")
def story():
    """The folder of the model, a calibration, and its tokens."""
    data = data_folder()
    calibration = Calibration(data / "tinystories" / "train.txt", SAMPLES, LENGTH)
    program = trace(data / "story-656k")
    return data / "story-656k", calibration, draw_windows(data / "story-656k", program, calibration).tokens


def both(story, tmp_path: Path, method: str, pattern: str, *, repair: bool = False, update: bool = False):
    """Weights of the layers' linears: as pruned from the folder, and as pruned plainly."""
    model, calibration, tokens = story
    prune(
        model, tmp_path / "out", method=method, pattern=pattern, calibration=calibration,
        repair="dsnot" if repair else None, update="admm" if update else None,
    )  # fmt: skip
    ours = load_file(tmp_path / "out" / "model.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain.prune(reference, tokens, method, pattern, repair=repair, update=update)
    theirs = {name: tensor for name, tensor in reference.state_dict().items() if "_proj" in name}
    assert len(theirs) == 14
    return [(ours[name], tensor) for name, tensor in theirs.items()]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "2:4"), ("wanda", "2:4"), ("wanda", "50%"), ("ria", "4:8"), ("ria", "50%")],
)
def test_masks_are_the_formulas(story, tmp_path, method, pattern):
    for ours, theirs in both(story, tmp_path, method, pattern):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pattern", ["2:4", "75%"])
def test_the_repair_is_the_formula(story, tmp_path, pattern):
    for ours, theirs in both(story, tmp_path, "wanda", pattern, repair=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_sparsegpt_is_the_algorithm(story, tmp_path, pattern):
    pairs = both(story, tmp_path, "sparsegpt", pattern)
    same = sum(int(((ours != 0) == (theirs != 0)).sum()) for ours, theirs in pairs)
    assert same >= 0.999 * sum(ours.numel() for ours, _ in pairs)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize(("method", "pattern"), [("magnitude", "2:4"), ("wanda", "50%")])
def test_the_update_is_the_algorithm(story, tmp_path, method, pattern):
    for ours, theirs in both(story, tmp_path, method, pattern, update=True):
        assert torch.equal(ours != 0, theirs != 0)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_an_update_keeps_the_mask_and_loses_no_more_than_sparsegpt(story, tmp_path):
    model, calibration, _ = story
    options = {"pattern": "2:4", "calibration": calibration}
    gpt = prune(model, tmp_path / "gpt", method="sparsegpt", **options)
    for method in ("wanda", "sparsegpt"):
        alone = prune(model, tmp_path / method, method=method, force=True, **options)
        updated = prune(model, tmp_path / f"{method}-admm", method=method, update="admm", **options)
        before, after = (load_file(each.out / "model.safetensors") for each in (alone, updated))
        first = [entry for entry in updated.lock.sites if entry.name.startswith("model.layers.0.")]
        assert len(first) == 7
        for entry in first:  # later layers see other inputs, and choose others
            assert torch.equal(before[entry.name] != 0, after[entry.name] != 0)
        for name, tensor in before.items():
            if name not in updated.reports:
                assert torch.equal(tensor, after[name])
        for entry in updated.lock.sites:
            lost = updated.errors(entry.name)
            assert lost["error_after"] <= lost["error_before"]
            if method == "sparsegpt":
                assert lost["error_after"] <= gpt.errors(entry.name)["error_after"], entry.name


def test_a_program_in_memory_is_pruned_as_a_folder_is(story, tmp_path):
    from spp_fx.passes.causal import Causal
    from spp_fx.passes.partition import Partition
    from spp_fx.passes.prune_sites import Prune

    model, calibration, tokens = story
    prune(model, tmp_path / "out", method="wanda", pattern="2:4", calibration=calibration, repair="dsnot")
    program = trace(model)
    program.calibration = tokens
    passes = [Canonicalize(), Match(dense=True), Partition(), Causal(), Prune(Wanda(), repair="dsnot")]
    run_pipeline(program, passes)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, program.get_parameter(name))
