"""Reordering inputs: the model computes what it did, and where that cannot be proven nothing is reordered."""

import pytest
import torch

from spp_fx.graph.flow import Flow
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.prune_sites import Prune
from spp_fx.pruning.criteria.ria import Ria
from spp_fx.pruning.permute import Producers, best_order, producers
from spp_fx.sparsity.pattern import parse_pattern
from tests.families import batch
from tests.passes.programs import loss_of, sparse


def reorder(program, site: str, makers: Producers) -> None:
    """Permute the inputs of a site at random, and what makes them."""
    order = torch.randperm(program.sites[site].in_features)
    with torch.no_grad():
        weight = program.canonical_weight(site)
        weight.copy_(weight[:, order])
        for name in makers.sites:
            rows = program.canonical_weight(name)
            rows.copy_(rows[order])
        for name in makers.biases:
            program.get_parameter(name).copy_(program.get_parameter(name)[order])


@pytest.mark.parametrize(
    ("family", "site", "makers"),
    [
        ("llama", "mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
        ("qwen2", "mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
        ("gpt2", "mlp.c_proj", {"mlp.c_fc"}),
        ("falcon", "mlp.dense_4h_to_h", {"mlp.dense_h_to_4h"}),
    ],
)
def test_a_proven_order_is_absorbed(family, site, makers):
    _, program = sparse(family)
    run_pipeline(program.eval(), [Partition()])
    for parameter in program.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = batch()
    with torch.no_grad():
        before = program(ids).logits
    for unit in program.units:
        found = producers(Flow(program), unit)[f"{unit}.{site}.weight"]
        assert isinstance(found, Producers), found
        assert set(found.sites) == {f"{unit}.{name}.weight" for name in makers}
        assert bool(found.biases) == (family == "gpt2")
        reorder(program, f"{unit}.{site}.weight", found)
    with torch.no_grad():
        torch.testing.assert_close(program(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("llama", "self_attn.q_proj.weight", "residual stream"),
        ("llama", "mlp.gate_proj.weight", "residual stream"),
        ("llama", "self_attn.o_proj.weight", "does not treat each entry alone"),
        ("gpt2", "attn.c_attn.weight", "does not treat each entry alone"),
        ("mixtral", "mlp.experts.down_proj", "stack of experts"),
    ],
)
def test_what_cannot_be_proven_has_a_reason(family, site, reason):
    _, program = sparse(family)
    run_pipeline(program, [Partition()])
    unit = program.units[0]
    assert reason in str(producers(Flow(program), unit)[f"{unit}.{site}"])


def test_an_order_keeps_more_or_is_none():
    torch.manual_seed(0)
    pattern = parse_pattern("2:4")
    score = torch.rand(16, 64) * torch.linspace(3, 0.1, 64)  # neighbours are alike: the worst for groups
    order = best_order(score, pattern)
    assert order is not None
    assert sorted(order.tolist()) == list(range(64))

    def kept(s: torch.Tensor) -> float:
        return float(s.view(-1, 4).topk(2, 1).values.sum())

    assert kept(score[:, order]) > kept(score)
    assert best_order(torch.ones(4, 8), pattern) is None


def test_snake_order():
    score = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert best_order(score, parse_pattern("1:4")).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_pruning_with_permutation_keeps_the_function_of_what_is_kept():
    """Only the mask makes a difference: put the dense entries back in their new places, and nothing changed."""
    _, program = sparse("llama")
    for name in program.sites:
        program.weight(name).data.normal_(0, 0.3)
        if "down_proj" in name:  # neighbours are alike: the worst for groups
            program.weight(name).data.mul_(torch.linspace(3, 0.1, 64))
    program.calibration = batch(4, 12)
    ids = batch(seed=1)
    before = loss_of(program, ids).item()
    run_pipeline(program, [Match(targets=("down_proj",), dense=True), Partition()])
    dense = {name: program.weight(name).detach().clone() for name in program.matched}
    (report,) = run_pipeline(program, [Prune(Ria(permute=True))])
    for name, weight in dense.items():
        note = report.changed[name]
        assert "inputs reordered, and with them the rows of" in note, note
        new = program.weight(name)
        assert int((new.view(-1, 4) != 0).sum(1).max()) == 2
        # A column of the new weight is a column of the old one, less what was pruned.
        order = [next(j for j in range(64) if bool(((c == weight[:, j]) | (c == 0)).all())) for c in new.t()]
        assert sorted(order) == list(range(64))
        new.data.copy_(weight[:, order])
    assert loss_of(program, ids).item() == pytest.approx(before, rel=1e-5)
