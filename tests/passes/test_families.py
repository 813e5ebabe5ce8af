"""The whole way of every family through every kernel: adapters in, trained, folded, the masks as they were."""

import copy

import pytest
import torch

from spp_fx.errors import MaskError, PreconditionError
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.lower import Lower
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.verify_masks import Verify
from tests.effort import covering_rows
from tests.families import FAMILIES, batch
from tests.passes.programs import adapted, canonical, loss_of, masks, sparse, train

KERNELS = ("reference", "blockwise", "fused")
FOLD_TOLERANCE = 1e-5  # float32: the fold sums each product in another order than the adapter does
EXECUTIONS = (*((kernel, 0.0) for kernel in KERNELS), ("fused", 0.3))


class Run:
    """A program before training, after training and after folding, with the model it was traced from."""

    def __init__(self, family: str, kernel: str, dropout: float) -> None:
        torch.manual_seed(1)
        self.model, program = sparse(family)
        adapted(program, kernel, dropout=dropout)
        self.start = masks(program)
        self.frozen = {
            name: p.detach().clone() for name, p in program.named_parameters() if not p.requires_grad
        }
        self.losses = train(program)
        self.trained = copy.deepcopy(program)
        run_pipeline(program, [Fold()])
        self.folded = program


@pytest.fixture(scope="module", params=covering_rows(1, family=FAMILIES, execution=EXECUTIONS))
def run(request):
    family, execution = request.param
    return Run(family, *execution)


def test_training_the_factors_lowers_the_loss(run):
    before, after = run.losses
    assert after < before - 1e-3


def test_training_moves_no_weight(run):
    for name, weight in run.frozen.items():
        assert torch.equal(run.trained.get_parameter(name), weight), name


def test_the_folded_masks_are_the_first_ones(run):
    assert run.folded.matched
    for name, mask in masks(run.folded).items():
        assert torch.equal(mask, run.start[name]), name


def test_folding_changes_every_matched_weight_and_no_other(run):
    changed = {
        name for name, weight in run.frozen.items() if not torch.equal(run.folded.get_parameter(name), weight)
    }
    assert changed == set(run.folded.matched)


def test_the_folded_program_passes_verify(run):
    (report,) = run_pipeline(copy.deepcopy(run.folded), [Verify(pattern="2:4")])
    assert set(report.changed) == set(run.folded.matched)


def test_the_folded_program_computes_what_the_adapters_did(run):
    ids = batch(3, 9, seed=2)
    with torch.no_grad():
        folded, trained = run.folded(ids).logits, run.trained(ids).logits
    torch.testing.assert_close(folded, trained, rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE)


def test_the_folded_program_is_the_model_itself(run):
    ids = batch(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(run.folded(ids).logits, run.model(ids).logits)


def test_folding_leaves_no_factor_behind(run):
    assert {name for name, _ in run.folded.named_parameters()} == set(run.frozen)


def test_folding_twice_is_refused(run):
    with pytest.raises(PreconditionError, match="no adapters"):
        run_pipeline(run.folded, [Fold()])


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_kernels_agree_on_loss_and_gradients(name):
    results = {}
    for kernel in (None, *KERNELS):
        program = adapted(canonical(name), kernel)
        for key, value in program.named_parameters():
            if key.endswith("beta"):
                torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(3))
        loss = loss_of(program, batch())
        loss.backward()
        results[kernel] = loss, {k: p.grad for k, p in program.named_parameters() if p.grad is not None}
    loss, gradients = results.pop(None)
    assert gradients
    for other, theirs in results.values():
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(theirs, gradients, rtol=1e-3, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_a_fold_that_overflows_leaves_every_weight_and_adapter_as_they_were(name):
    program = adapted(canonical(name), scale=1e6)
    last = list(program.adapters)[-1].removesuffix(".weight")
    (beta,) = [p for key, p in program.named_parameters() if key.startswith(last) and key.endswith("beta")]
    torch.nn.init.constant_(beta, 3e38)
    before = {key: p.detach().clone() for key, p in program.named_parameters()}
    with pytest.raises(MaskError, match=rf"{last}.*row \d+, column \d+"):
        run_pipeline(program, [Fold()])
    assert {key for key, _ in program.named_parameters()} == set(before)
    assert all(torch.equal(p, before[key]) for key, p in program.named_parameters())


def test_lowering_twice_is_refused():
    program = adapted(canonical("llama"), "reference")
    with pytest.raises(PreconditionError, match="lowered already"):
        run_pipeline(program, [Lower(kernel="fused")])
