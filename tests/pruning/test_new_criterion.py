"""A criterion of another package: one class whose field is its option, through the verb and through the pass."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import parse_pipeline, print_pipeline, run_pipeline
from spp_fx.pruning.criterion import CRITERIA, Criterion, register
from spp_fx.verbs.load import Calibration
from spp_fx.verbs.prune import prune
from tests.families import batch
from tests.passes.programs import sparse
from tests.verbs.conftest import save_with_tokenizer


@pytest.fixture(autouse=True)
def _made_up():
    @register("made-up")
    @dataclass(frozen=True)
    class MadeUp(Criterion):
        """|W_ij| * ||x_j||^power: magnitude at 0, wanda at 1."""

        power: float = field(default=1.0, metadata={"help": "of the inputs' norms"})

        def score(self, weight, inputs):
            return weight.abs() * inputs.norms**self.power

    yield
    del CRITERIA["made-up"]


OPTIONS = {"magnitude": {"power": 0.0}, "wanda": {}, None: {"power": 4.0}}
"""A criterion that chooses the same entries of groups, or none, and the options with which the made-up one does."""


def test_through_the_verb_layer_by_layer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A cat sat on a mat, and saw how the dog ran by.\n" * 200)
    save_with_tokenizer(tmp_path / "dense", text)

    def pruned(method, options):
        out = tmp_path / f"{method}{len(list(tmp_path.iterdir()))}"
        done = prune(
            tmp_path / "dense", out, method=method, pattern="2:4", **options,
            calibration=Calibration(text, 4, 32),
        )  # fmt: skip
        assert done.calibration is not None
        return load_file(out / "model.safetensors")

    own = {same: pruned("made-up", options) for same, options in OPTIONS.items()}
    known = {method: pruned(method, {}) for method in ("magnitude", "wanda")}
    for same, tensors in own.items():
        equal = {m for m, theirs in known.items() if all(torch.equal(tensors[n], theirs[n]) for n in theirs)}
        assert equal == ({same} if same else set())


@pytest.mark.parametrize("same", OPTIONS)
def test_through_the_pass_layer_by_layer(same):
    text = "prune{method=made-up" + "".join(f",{k}={v}" for k, v in OPTIONS[same].items()) + "}"
    passes = parse_pipeline(text)
    assert print_pipeline(passes) == text
    found = []
    for item in (passes[0], *parse_pipeline("prune{method=magnitude},prune{method=wanda}")):
        _, program = sparse("llama")
        torch.manual_seed(0)
        for name in program.sites:
            program.weight(name).data.normal_()
        program.calibration = batch(4, 12)
        run_pipeline(program, [Match(dense=True), Partition(), item])
        found.append({name: program.weight(name).detach() != 0 for name in program.matched})
    mine, *others = found
    equal = [all(torch.equal(mine[name], masks[name]) for name in mine) for masks in others]
    assert equal == [same == "magnitude", same == "wanda"]
