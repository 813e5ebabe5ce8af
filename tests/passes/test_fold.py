"""fold in graphs: shared weights, unfinished programs, errors that change nothing."""

import pytest
import torch
from torch import fx, nn
from transformers import PretrainedConfig

from spp_fx.adapters.lora_star import LoRAStar
from spp_fx.adapters.spp import SPP
from spp_fx.errors import MaskError, PostconditionError, PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER, Program
from spp_fx.graph.task import Task
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.effort import nightly
from tests.families import batch
from tests.passes.programs import adapted, canonical

aten = torch.ops.aten


def shared_weight_program() -> Program:
    """y = (x W^T) W^T in one graph module: a site with two uses."""
    module = nn.Module()
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module.weight = nn.Parameter(weight * (torch.arange(8) % 2), requires_grad=False)
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    once = graph.call_function(aten.linear.default, (x, w))
    graph.output(graph.call_function(aten.linear.default, (once, w)))
    outer = nn.Module()
    outer.layer = fx.GraphModule(module, graph)
    calls = fx.Graph()
    calls.output(calls.call_module("layer", (calls.placeholder("x"),)))
    return Program(fx.GraphModule(outer, calls), Task(), (), PretrainedConfig(), None, {}, None)


def fill_factors(program: Program, value: float = 0.25) -> None:
    for parameter in program.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(value)


@pytest.mark.parametrize("kernel", [None, "reference", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", [SPP, LoRAStar])
def test_a_weight_used_twice_in_one_graph_folds_once(method, kernel, dropout):
    program = shared_weight_program()
    inject = Inject(method(rank=4, dropout=dropout))
    run_pipeline(program, [Canonicalize(), Match(targets=("layer",)), inject])
    program.eval()
    if kernel:
        run_pipeline(program, [Lower(kernel=kernel)])
    fill_factors(program)
    before = program.weight("layer.weight").detach().clone()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    adapted_output = program.root(x)
    run_pipeline(program, [Fold()])
    change = 2.0 * 0.25 * 0.25
    expected = before * (1 + change) if method is SPP else before + 4 * change * (before != 0)
    assert torch.equal(program.weight("layer.weight"), expected)
    torch.testing.assert_close(program.root(x), adapted_output, rtol=0, atol=1e-12)
    assert [name for name, _ in program.named_parameters()] == ["layer.weight"]


@pytest.mark.parametrize("kernel", [None, "reference", "fused"])
def test_folded_graphs_are_the_graphs_before(kernel):
    plain = canonical("llama")
    targets = {path: [n.target for n in m.graph.nodes] for path, m in plain.graphs()}
    program = adapted(canonical("llama"), kernel)
    run_pipeline(program, [Fold()])
    assert {path: [n.target for n in m.graph.nodes] for path, m in program.graphs()} == targets
    assert program.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("gpt2", "fused"), nightly("gpt2", "reference"), nightly("mixtral", "fused"), ("mixtral", "reference")],
)
def test_a_dense_update_is_evaluated_as_it_is_folded(family, kernel):
    """Of transposed weights and stacks, too; in training it is not."""
    program = canonical(family)
    targets = {path: [n.target for n in m.graph.nodes] for path, m in program.graphs()}
    adapted(program, kernel, "lora-star", dropout=0.0)
    fill_factors(program, 0.1)
    ids = batch()
    with torch.no_grad():
        evaluated, trained = program.eval()(ids).logits, program.train()(ids).logits
        run_pipeline(program, [Fold()])
        torch.testing.assert_close(program.eval()(ids).logits, evaluated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, evaluated, atol=1e-3)
    assert {path: [n.target for n in m.graph.nodes] for path, m in program.graphs()} == targets


def test_untrained_factors_fold_to_the_same_bits():
    program = adapted(canonical("gpt2"))
    before = {name: program.weight(name).detach().clone() for name in program.adapters}
    run_pipeline(program, [Fold()])
    for name, weight in before.items():
        assert torch.equal(program.weight(name).view(torch.int32), weight.view(torch.int32)), name


@pytest.mark.parametrize("vanish", ["keep", "error"])
def test_an_error_leaves_every_weight_and_adapter(vanish):
    program = adapted(canonical("llama"))
    last = list(program.adapters)[-1]
    owner = program.get_submodule(last.rpartition(".")[0])
    owner.get_parameter("spp_alpha").data.fill_(float("nan"))
    owner.get_parameter("spp_beta").data.fill_(1.0)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    with pytest.raises(MaskError, match=rf"{last}: row \d+, column \d+ folds to nan"):
        run_pipeline(program, [Fold(vanish=vanish)])
    assert last in program.adapters
    for name, value in program.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_fold_refuses_what_it_does_not_know():
    with pytest.raises(UsageError, match="must be one of keep, error, allow"):
        run_pipeline(adapted(canonical("llama")), [Fold(vanish="sometimes")])


def test_fold_refuses_a_program_without_weights():
    program = adapted(canonical("llama")).to("meta")
    with pytest.raises(PreconditionError, match="meta device"):
        run_pipeline(program, [Fold()])


def test_an_adapter_left_behind_breaks_the_promise():
    program = adapted(canonical("llama"))
    forgotten = next(iter(program.adapters))
    method = program.adapters.pop(forgotten)
    with pytest.raises(PostconditionError, match=forgotten):
        run_pipeline(program, [Fold()])
    assert forgotten in program.uses(ADAPTER)
    assert method.rank == 4
